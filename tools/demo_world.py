"""The small world behind the packaged demo: people who do everyday things, one step at a time.

Every activity is a script of steps in which each step needs what the step before it has brought
about, so that there is one right continuation, and continuations that are wrong for a reason:

* ``order``: a step of the same activity that was done before or cannot be done yet;
* ``tool``: the right step done with a tool for another job;
* ``object``: the right step done to a thing that the context did not speak of;
* ``agent``: the right step with a reflexive pronoun that does not fit the person;
* ``elsewhere``: a step of an activity that has nothing to do with this one.

Templates are ``str.format`` strings. Their fields are pronouns (``his``, ``himself``), the
activity's own objects, or a class of tools. Alternatives of one step are parted by " | ", and a
step that might as well come at another time starts with "~": it is no ``order`` distractor.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

CHOICES = 4
HELD_OUT_ONE_IN = 4  # people, and one in so many sets of objects, for each activity
# A kind that stands here twice may be drawn twice.
KINDS = ("order", "order", "tool", "object", "object", "agent", "elsewhere", "elsewhere")


@dataclass(frozen=True)
class Person:
    """Someone who acts: how a text first names them and how it goes on to speak of them."""

    name: str
    again: tuple[str, ...]
    female: bool

    def pronouns(self) -> dict[str, str]:
        """The template fields that depend on who acts."""
        if self.female:
            return {"his": "her", "himself": "herself"}
        return {"his": "his", "himself": "himself"}

    def other(self) -> Person:
        """Someone whose pronouns differ."""
        return Person(self.name, self.again, not self.female)


@dataclass(frozen=True)
class Step:
    """One step in several wordings; ``loose`` if it might as well come at another time."""

    wordings: tuple[str, ...]
    loose: bool


@dataclass(frozen=True)
class Activity:
    """A script: its topic, its variable objects, its opening scenes and its ordered steps."""

    label: str
    domain: str
    objects: dict[str, tuple[str, ...]]
    scenes: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class World:
    """One filled-in activity: who does it, to which objects, with which tools."""

    person: Person
    activity: Activity
    objects: dict[str, str]
    tools: dict[str, str]

    def fields(self) -> dict[str, str]:
        """Everything a template may ask for."""
        return {**self.person.pronouns(), **self.objects, **self.tools}


# Zoë, José and their like are here for their letters, which the tokenizer spells in bytes.
WOMEN = (
    "Anna Maria Sofia Emma Lucy Nora Clara Julia Hannah Alice Ruth Elena Grace Martha Leila "
    "Amina Priya Zoë Renée Olga"
).split()
MEN = (
    "Tom Ben Paul Oscar Henry Jonas Daniel Peter Samir Omar Diego Ravi Kenji Luca Martin Felix "
    "Hugo Adam José André"
).split()
PEOPLE = (
    *(Person(name, ("she",), True) for name in WOMEN),
    *(Person(name, ("he",), False) for name in MEN),
    *(Person(name, ("she", "the woman"), True) for name in ("A woman", "A young woman")),
    *(Person(name, ("he", "the man"), False) for name in ("A man", "An old man")),
    *(Person(name, ("she", "the lady"), True) for name in ("An old lady", "A tall lady")),
    *(Person(name, ("he", "the guy"), False) for name in ("A tall guy", "A young guy")),
)

TOOLS = {
    "spoon": ("a small spoon", "a long spoon", "a wooden spoon"),
    "knife": ("a sharp knife", "a kitchen knife", "a bread knife"),
    "scissors": ("a pair of scissors", "sharp scissors"),
    "sponge": ("a soft sponge", "a yellow sponge", "a big sponge"),
    "towel": ("a clean towel", "a soft towel", "a dry cloth"),
    "spade": ("a spade", "a garden shovel"),
    "hammer": ("a hammer", "a wooden mallet"),
    "pencil": ("a pencil", "a piece of chalk"),
    "pen": ("a blue pen", "a fountain pen"),
    "brush": ("a thin brush", "a wide brush"),
    "can": ("a watering can", "the garden hose"),
    "wrench": ("a wrench", "a pair of pliers"),
    "pump": ("a bicycle pump", "a hand pump"),
    "broom": ("a broom", "a straw broom"),
    "match": ("a match", "a long match"),
    "net": ("a fishing net", "a landing net"),
    "spatula": ("a spatula", "a flat spatula"),
    "mitts": ("thick gloves", "oven mitts"),
}
# Tools that could stand in for one another are no wrong choice.
ALIKE = (
    {"sponge", "towel", "broom", "mitts", "brush"},
    {"pencil", "pen", "brush", "knife", "scissors"},
    {"spoon", "spatula", "spade", "knife", "net", "scissors"},
    {"hammer", "wrench", "spade"},
    {"mitts", "spatula", "towel"},
    {"can", "net"},
)

ADVERBS = (
    "carefully slowly calmly quickly patiently happily quietly cheerfully briskly skillfully"
).split()
TAILS = (
    "and smiles",
    "and hums a quiet tune",
    "without any hurry",
    "while a friend watches",
    "while talking to the camera",
    "just as planned",
)
CONNECTORS = ("", "", "", "then ", "next, ", "after that, ", "a moment later, ")


def _activity(
    label: str, domain: str, objects: dict[str, str], scenes: str, *steps: str
) -> Activity:
    """An activity from compact strings; see the head of this file for their notation."""
    return Activity(
        label,
        domain,
        {name: tuple(values.split(", ")) for name, values in objects.items()},
        tuple(scenes.split(" | ")),
        tuple(Step(tuple(step.lstrip("~").split(" | ")), step[0] == "~") for step in steps),
    )


ACTIVITIES = (
    _activity(
        "Making tea",
        "kitchen",
        {
            "mug": "blue mug, white cup, tin mug, china cup, tall mug",
            "tea": "mint tea, black tea, green tea, ginger tea",
        },
        "is standing in a small kitchen next to the {mug} | has put the {mug} on the kitchen table",
        "fills the empty kettle with cold water | "
        "holds the empty kettle under the tap until it is full",
        "puts the full kettle on the stove and turns on the heat | "
        "sets the heavy kettle on the stove to boil",
        "drops a dry bag of {tea} into the {mug} while the kettle heats up | "
        "waits for the kettle and puts a dry bag of {tea} into the {mug}",
        "pours the boiling water over the tea bag in the {mug} | "
        "takes the whistling kettle and fills the {mug} with boiling water",
        "lifts the wet tea bag out of the {mug} with {spoon} | "
        "lets the {tea} steep and then takes out the wet bag",
        "stirs some honey into the hot {tea} with {spoon} | "
        "adds honey to the hot {tea} in the {mug}",
        "~sits down and drinks the sweet {tea} from the {mug} | "
        "carries the {mug} to the window and takes the first sip",
    ),
    _activity(
        "Baking bread",
        "kitchen",
        {
            "bowl": "clay bowl, steel bowl, large bowl, wooden bowl",
            "loaf": "round loaf, long loaf, flat loaf, braided loaf",
        },
        "is wearing an apron and stands behind the {bowl} | "
        "is in the bakery with flour and the {bowl}",
        "mixes flour, water and yeast in the {bowl} | "
        "pours flour into the {bowl} and adds water and yeast",
        "kneads the sticky dough on the table with both hands | "
        "folds and presses the sticky dough until it is smooth",
        "puts the smooth dough back into the {bowl} and lets it rise | "
        "covers the {bowl} of smooth dough and waits for an hour",
        "shapes the risen dough into a {loaf} | takes the risen dough and forms a {loaf}",
        "slides the unbaked {loaf} into the hot oven | "
        "puts the unbaked {loaf} on a tray and pushes it into the oven",
        "takes the golden {loaf} out of the oven with {mitts} | "
        "opens the oven and pulls out the golden {loaf}",
        "cuts {himself} a slice of the warm bread with {knife} | "
        "slices the warm {loaf} with {knife}",
    ),
    _activity(
        "Washing the dishes",
        "kitchen",
        {
            "dish": "plates, bowls, pans, cups, glasses, pots",
            "cupboard": "cupboard, cabinet, kitchen drawer, kitchen shelf",
        },
        "is in the kitchen between the sink and the {cupboard} | "
        "has finished dinner and looks at the dirty {dish}",
        "fills the empty sink with hot water and some soap | "
        "plugs the empty sink and runs hot water and soap into it",
        "lowers the dirty {dish} into the soapy water | "
        "puts the dirty {dish} one by one into the full sink",
        "scrubs the dirty {dish} with {sponge} | rubs the food off the {dish} with {sponge}",
        "rinses the soap off the {dish} under the tap | "
        "holds the soapy {dish} under clear running water",
        "dries the wet {dish} with {towel} | rubs the wet {dish} with {towel} until they are dry",
        "puts the dry {dish} back into the {cupboard} | "
        "carries the clean dry {dish} to the {cupboard}",
    ),
    _activity(
        "Making pancakes",
        "kitchen",
        {
            "bowl": "glass bowl, mixing bowl, deep bowl, yellow bowl",
            "jam": "plum jam, maple syrup, honey, cherry jam, sugar",
        },
        "is making breakfast and takes the {bowl} from the shelf | "
        "is in a kitchen with the {bowl} and a box of eggs",
        "cracks two eggs into the empty {bowl} | breaks two eggs on the edge of the {bowl}",
        "adds flour and milk to the eggs in the {bowl} | pours flour and milk over the raw eggs",
        "beats the eggs, flour and milk into a smooth batter | "
        "stirs everything in the {bowl} with {spoon} until the batter is smooth",
        "~pours some of the smooth batter into the hot pan | "
        "spreads a thin layer of batter in the hot pan",
        "turns the half-done pancake over with {spatula} | "
        "shakes the pan and flips the half-done pancake",
        "slides the golden pancake from the pan onto a plate | "
        "lifts the golden pancake onto a plate with {spatula}",
        "spreads {jam} on the finished pancake and takes a bite | "
        "serves the finished pancake with {jam}",
    ),
    _activity(
        "Making a salad",
        "kitchen",
        {
            "veg": "cucumbers, tomatoes, mushrooms, peppers, carrots, radishes",
            "bowl": "salad bowl, glass bowl, wooden bowl, green bowl",
        },
        "is back from the market with fresh {veg} | has put the {veg} and the {bowl} on the table",
        "washes the dirt off the fresh {veg} under the tap | "
        "holds the fresh {veg} under cold water to clean them",
        "chops the washed {veg} on a board with {knife} | "
        "lays the washed {veg} on a board and cuts them into pieces",
        "drops the chopped {veg} into the {bowl} | "
        "moves the chopped {veg} from the board into the {bowl}",
        "pours oil and vinegar over the {veg} in the {bowl} | "
        "adds salt, oil and lemon juice to the {bowl}",
        "mixes the oily {veg} in the {bowl} with {spoon} | "
        "turns the {veg} over in the dressing with {spoon}",
        "~carries the {bowl} of salad to the table | "
        "brings the finished salad to the table and serves everyone",
    ),
    _activity(
        "Planting a tree",
        "garden",
        {
            "tree": "cherry tree, plum tree, pear tree, fig tree, lemon tree",
            "pot": "plastic pot, clay pot, big pot",
        },
        "is in the garden with a young {tree} in a {pot} | "
        "has brought home a young {tree} in a {pot}",
        "digs a deep hole in the lawn with {spade} | "
        "pushes {spade} into the lawn and digs a deep hole",
        "pulls the young {tree} out of the {pot} | "
        "takes the roots of the {tree} out of the {pot} and loosens them",
        "sets the loose roots of the {tree} into the deep hole | "
        "stands the young {tree} upright in the middle of the hole",
        "fills the hole around the {tree} with loose soil | "
        "shovels the loose soil back over the roots of the {tree}",
        "presses down the loose soil around the trunk with {his} boots | "
        "steps on the loose soil until the {tree} stands firmly",
        "waters the firmly planted {tree} with {can} | "
        "takes {can} and soaks the soil around the planted {tree}",
    ),
    _activity(
        "Raking leaves",
        "garden",
        {
            "tree": "maple, birch, chestnut, walnut, linden",
            "basket": "basket, sack, wheelbarrow, barrel",
        },
        "is outside on a cool autumn day, and the {tree} leaves have fallen | "
        "is looking at a lawn full of {tree} leaves",
        "walks to the shed and takes out the rake | "
        "gets the rake and the empty {basket} from the shed",
        "~pulls the rake over the lawn and gathers the {tree} leaves | "
        "rakes the scattered {tree} leaves into a high pile",
        "~lifts the pile of {tree} leaves into the {basket} | "
        "stuffs the {basket} with leaves from the high pile",
        "takes the full {basket} to the compost behind the house | "
        "brings the {basket} full of leaves to the compost",
        "empties the full {basket} onto the compost | "
        "tips the {tree} leaves out of the {basket} onto the compost",
        "brings the rake and the empty {basket} back to the tidy shed | "
        "locks the shed and looks proudly at the clean lawn",
    ),
    _activity(
        "Picking fruit",
        "garden",
        {
            "fruit": "plums, cherries, pears, figs, peaches",
            "basket": "basket, bucket, wooden box, bag",
        },
        "is in the orchard, where the {fruit} are ripe | "
        "is walking through the orchard with an empty {basket}",
        "leans the ladder against the tree with the ripe {fruit} | "
        "sets up the ladder under the ripe {fruit}",
        "climbs up the ladder with the empty {basket} | "
        "goes up the ladder and hooks the {basket} to a branch",
        "~picks the ripe {fruit} and fills the {basket} | "
        "reaches into the leaves and drops {fruit} into the {basket}",
        "climbs down the ladder with the full {basket} | "
        "brings the {basket} of {fruit} back down to the ground",
        "washes the picked {fruit} under the garden tap | "
        "pours cold water over the picked {fruit} in the {basket}",
        "bites into one of the freshly washed {fruit} | "
        "shares the freshly washed {fruit} with the neighbors",
    ),
    _activity(
        "Building a snowman",
        "winter",
        {
            "hat": "straw hat, black hat, wool cap, top hat",
            "scarf": "red scarf, striped scarf, green scarf, long scarf",
        },
        "is in the snowy yard with the {hat} and the {scarf} | "
        "is wearing mittens and steps out into the fresh snow",
        "makes a small snowball and rolls it until it is huge | "
        "rolls a snowball across the yard until it is too heavy to move",
        "rolls a second ball and lifts it onto the huge one | "
        "sets a middle ball of snow on top of the heavy one",
        "puts a small round ball on the very top as a head | "
        "forms a round head and sets it on the two balls",
        "pushes two stones and a carrot into the head for a face | "
        "gives the round head a carrot nose and stone eyes",
        "wraps the {scarf} around the neck below the smiling face | "
        "ties the {scarf} under the carrot nose of the snowman",
        "~puts the {hat} on the snowman and takes a picture | "
        "places the {hat} on the head to finish the snowman",
    ),
    _activity(
        "Washing the car",
        "chores",
        {
            "car": "red car, white van, small truck, jeep, family car",
            "yard": "driveway, yard, courtyard, parking lot",
        },
        "has parked the dusty {car} in the {yard} | is standing in the {yard} by the dusty {car}",
        "unrolls the long hose and connects it to the tap | "
        "drags the hose across the {yard} and turns on the water",
        "~sprays the dust off the {car} with the hose | "
        "points the hose at the dusty {car} and wets it all over",
        "rubs soap over the wet {car} with {sponge} | "
        "dips {sponge} into soapy water and washes the wet {car}",
        "rinses the foam off the {car} with clear water | "
        "washes the soapy foam off the roof and doors of the {car}",
        "dries the clean wet {car} with {towel} | "
        "wipes the last drops of water off the {car} with {towel}",
        "rubs wax on the dry {car} until it shines | polishes the dry doors of the {car} with wax",
    ),
    _activity(
        "Doing the laundry",
        "chores",
        {
            "clothes": "shirts, towels, socks, sheets, dresses, jeans",
            "basket": "basket, hamper, blue tub",
        },
        "has a {basket} full of dirty {clothes} | is sorting the dirty {clothes} in the {basket}",
        "stuffs the dirty {clothes} into the washing machine | "
        "opens the washing machine and loads the dirty {clothes}",
        "adds soap powder to the machine and presses the start button | "
        "closes the loaded washing machine, adds soap and starts it",
        "waits for the machine to stop and takes out the wet {clothes} | "
        "pulls the wet {clothes} out of the machine into the {basket}",
        "hangs the wet {clothes} on the line in the sun | "
        "pins the wet {clothes} to the line with wooden pegs",
        "takes the dry {clothes} off the line in the evening | "
        "removes the pegs and drops the dry {clothes} into the {basket}",
        "irons the dry {clothes} and folds them neatly | "
        "folds the dry {clothes} and puts them away in the closet",
    ),
    _activity(
        "Mopping the floor",
        "chores",
        {"room": "kitchen, hall, office, dining room, shop", "bucket": "bucket, pail, big bucket"},
        "is looking at the dusty floor of the {room} | "
        "is in the {room} with a mop and the {bucket}",
        "sweeps the dust off the {room} floor with {broom} | "
        "takes {broom} and sweeps the dusty floor of the {room}",
        "fills the empty {bucket} with hot water and soap | "
        "runs hot water into the {bucket} and adds some soap",
        "~dips the dry mop into the soapy {bucket} | "
        "soaks the dry mop in the soapy water and squeezes it",
        "pushes the wet mop back and forth over the {room} floor | "
        "mops the floor of the {room} from corner to corner",
        "pours the dirty water from the {bucket} down the drain | "
        "carries the {bucket} of dirty water to the drain and empties it",
        "puts the clean mop away and admires the shiny {room} floor | "
        "leaves the empty {bucket} and the clean mop in the closet",
    ),
    _activity(
        "Brushing teeth",
        "body",
        {
            "toothbrush": "blue toothbrush, soft toothbrush, green toothbrush, new toothbrush",
            "glass": "glass, plastic cup, paper cup",
        },
        "is in the bathroom in front of the mirror | "
        "is standing at the bathroom sink with the {toothbrush}",
        "opens the tube and squeezes toothpaste onto the {toothbrush} | "
        "puts some toothpaste on the dry {toothbrush}",
        "~brushes {his} front teeth in small circles | "
        "moves the {toothbrush} up and down over {his} teeth",
        "spits the minty foam into the sink | bends over the sink and spits out the foam",
        "rinses {his} mouth with water from the {glass} | "
        "fills the {glass} and rinses the last foam out of {his} mouth",
        "dries {his} wet mouth with {towel} | wipes the water off {his} chin with {towel}",
        "looks at {himself} in the mirror and checks {his} clean teeth | "
        "puts the {toothbrush} away and smiles at {himself} in the mirror",
    ),
    _activity(
        "Bathing the dog",
        "animals",
        {
            "dog": "puppy, brown dog, poodle, terrier, beagle",
            "tub": "bathtub, metal tub, plastic tub",
        },
        "is looking at the {dog}, which is covered in mud | "
        "is calling the muddy {dog} to the {tub}",
        "fills the empty {tub} with warm water | "
        "runs warm water into the {tub} and tests it with one finger",
        "lifts the muddy {dog} into the full {tub} | sets the muddy {dog} down in the warm water",
        "rubs shampoo into the wet fur of the {dog} | "
        "washes the wet {dog} with shampoo from head to tail",
        "rinses the shampoo out of the fur of the {dog} | pours clear water over the foamy {dog}",
        "lifts the dripping {dog} out and dries it with {towel} | "
        "wraps the dripping {dog} in a large towel",
        "combs the dry fur of the {dog} and ties a bow | "
        "rewards the clean dry {dog} with a biscuit",
    ),
    _activity(
        "Walking the dog",
        "animals",
        {
            "dog": "puppy, spotted dog, poodle, collie, dachshund",
            "toy": "red ball, stick, rubber ring, tennis ball",
        },
        "is at home, and the {dog} is waiting by the door | is putting on shoes next to the {dog}",
        "clips the leash to the collar of the {dog} | "
        "takes the leash from its hook and puts it on the {dog}",
        "opens the front door and leads the {dog} outside | "
        "steps out of the house with the {dog} on the leash",
        "walks along the street with the {dog} to the park | "
        "crosses the street and takes the {dog} into the park",
        "lets the {dog} off the leash and throws the {toy} | "
        "throws the {toy} across the park for the {dog} to fetch",
        "takes the tired {dog} and the {toy} back home | "
        "puts the {toy} away and walks the tired {dog} home",
        "hangs the leash on its hook and feeds the hungry {dog} | "
        "closes the door at home and lets the {dog} sleep in its bed",
    ),
    _activity(
        "Riding a horse",
        "animals",
        {
            "horse": "pony, white mare, brown horse, black horse",
            "path": "beach, river, forest path, country road",
        },
        "is in front of the stable with the {horse} | "
        "is at the farm and strokes the nose of the {horse}",
        "leads the {horse} out of its stall by the reins | "
        "opens the stall and brings the {horse} into the yard",
        "lays the saddle on the bare back of the {horse} | "
        "puts the saddle on the {horse} and tightens the strap",
        "puts one foot in the stirrup and swings into the saddle | "
        "climbs up into the saddle and takes the reins",
        "rides the {horse} at a trot along the {path} | "
        "gives the {horse} a gentle kick and rides along the {path}",
        "rides back from the {path} and jumps down from the saddle | "
        "stops the {horse} at the stable and gets out of the saddle",
        "takes the saddle off the tired {horse} and feeds it hay | "
        "brings the tired {horse} back to its stall without the saddle",
    ),
    _activity(
        "Painting a room",
        "workshop",
        {"color": "blue, green, white, yellow, gray", "room": "bedroom, hall, living room, attic"},
        "is in the empty {room} with a can of {color} paint | "
        "has cleared the {room} and put on old clothes",
        "covers the floor of the {room} with old newspapers | "
        "spreads old newspapers over the floor to protect it",
        "pries the lid off the can of {color} paint | opens the sealed can of {color} paint",
        "stirs the {color} paint in the open can with a stick | "
        "mixes the thick {color} paint until it is smooth",
        "~dips the clean roller into the {color} paint | "
        "soaks the clean roller in the smooth {color} paint",
        "rolls the {color} paint onto the bare walls of the {room} | "
        "moves the wet roller up and down the bare walls",
        "steps back and admires the {color} walls of the {room} | "
        "washes the roller and lets the {color} walls dry",
    ),
    _activity(
        "Building a birdhouse",
        "workshop",
        {"wood": "pine, cedar, birch, beech", "color": "red, blue, green, yellow, white"},
        "is in the workshop with a long {wood} board | has put a {wood} board on the workbench",
        "measures the {wood} board and marks it with {pencil} | "
        "draws lines across the uncut {wood} board with {pencil}",
        "saws the marked {wood} board into six pieces | picks up the saw and cuts along the lines",
        "smooths the rough pieces of {wood} with sandpaper | "
        "sands the rough edges of the six pieces",
        "nails the smooth pieces together with {hammer} | "
        "joins the smooth {wood} pieces with nails and {hammer}",
        "paints the finished birdhouse {color} with {brush} | "
        "gives the unpainted birdhouse a coat of {color} paint",
        "hangs the painted birdhouse on a branch in the garden | "
        "fixes the {color} birdhouse to a tree for the birds",
    ),
    _activity(
        "Fixing a flat tire",
        "workshop",
        {
            "bike": "red bike, mountain bike, racing bike, rusty bike",
            "patch": "rubber patch, round patch, small patch",
        },
        "is kneeling beside the {bike} with the flat tire | "
        "has noticed that the {bike} has a flat tire",
        "turns the {bike} over and loosens the wheel with {wrench} | "
        "takes the flat wheel off the {bike} with {wrench}",
        "pulls the torn inner tube out of the tire | "
        "opens the tire and takes out the torn inner tube",
        "finds the hole in the tube and cleans it | "
        "holds the torn tube under water to find the hole",
        "glues the {patch} over the hole in the tube | "
        "presses the {patch} onto the hole and lets the glue dry",
        "puts the patched tube and the wheel back on the {bike} | "
        "pushes the patched tube into the tire and mounts the wheel",
        "pumps air into the mended tire with {pump} | "
        "takes {pump} and fills the mended tire with air",
        "rides the repaired {bike} down the street | gets on the repaired {bike} and rides away",
    ),
    _activity(
        "Swimming laps",
        "sport",
        {
            "stroke": "breaststroke, backstroke, front crawl, butterfly",
            "pool": "indoor pool, city pool, hotel pool",
        },
        "is at the {pool} to practice the {stroke} | is walking from the showers to the {pool}",
        "puts on the goggles and steps up to the edge | "
        "pulls the goggles over {his} eyes and stands at the edge",
        "~dives from the edge into the water of the {pool} | "
        "jumps off the edge into the deep water",
        "~swims the {stroke} to the far end of the {pool} | "
        "starts with the {stroke} and swims across the {pool}",
        "touches the far wall, turns and swims back to the start | "
        "turns at the far wall and swims the {stroke} back",
        "~climbs up the ladder and leaves the {pool} | "
        "pulls {himself} out of the water at the ladder",
        "dries {himself} with {towel} beside the {pool} | "
        "takes off the wet goggles and wraps {himself} in a towel",
    ),
    _activity(
        "Playing tennis",
        "sport",
        {
            "court": "clay court, grass court, indoor court, sunny court",
            "racket": "new racket, light racket, wooden racket",
        },
        "is walking to the {court} with a sports bag | "
        "is at the tennis club and has the {court} for one hour",
        "takes the {racket} out of the sports bag | unzips the bag and pulls out the {racket}",
        "walks onto the {court} and stands behind the line | "
        "goes to the base line of the {court} with the {racket}",
        "~bounces the ball and throws it up to serve | "
        "tosses the ball into the air above the {racket}",
        "hits the falling ball over the net with the {racket} | "
        "swings the {racket} and serves the ball over the net",
        "runs after the returned ball and wins the last point | "
        "plays a long rally and wins the match on the {court}",
        "shakes hands with the beaten player at the net | "
        "thanks the other player for the match and packs the {racket} away",
    ),
    _activity(
        "Playing music",
        "stage",
        {
            "guitar": "guitar, banjo, ukulele, mandolin",
            "song": "slow song, folk song, love song, cheerful song",
        },
        "is on a small stage with the {guitar} in its case | "
        "is about to play a {song} on the {guitar}",
        "opens the case and takes out the {guitar} | lifts the {guitar} out of its open case",
        "sits down on a stool with the {guitar} | "
        "lays the {guitar} across {his} knees and sits up straight",
        "tunes the loose strings of the {guitar} | "
        "turns the pegs until every string of the {guitar} is in tune",
        "~plays the first chords of a {song} | strums the tuned strings and begins a {song}",
        "sings the last verse and lets the final chord fade | "
        "ends the {song} with one long final chord",
        "stands up and bows to the clapping audience | "
        "thanks the clapping audience and puts the {guitar} into its case",
    ),
    _activity(
        "Painting a picture",
        "art",
        {
            "subject": "castle, lighthouse, sunflower, sailing ship, mountain, windmill",
            "paper": "canvas, sheet of paper, wooden panel",
        },
        "is in the studio and wants to paint a {subject} | "
        "is sitting in front of an empty easel with a blank {paper}",
        "fixes the blank {paper} to the easel | sets the blank {paper} upright on the empty easel",
        "sketches the outline of a {subject} with {pencil} | "
        "draws a {subject} in thin lines on the blank {paper}",
        "~squeezes paint from the tubes onto the palette | "
        "puts some fresh paint on the clean palette",
        "~dips {brush} into the paint on the palette | "
        "picks up some paint from the palette with {brush}",
        "fills the outline of the {subject} with bright color | "
        "paints over the thin lines until the {subject} glows",
        "signs the finished painting of the {subject} in the corner | "
        "writes {his} name under the finished {subject}",
    ),
    _activity(
        "Sewing on a button",
        "art",
        {"coat": "coat, shirt, jacket, blouse, vest", "color": "black, white, red, brown"},
        "has found that the {coat} has lost a button | "
        "is sitting by the lamp with the {coat} and a loose button",
        "cuts off a piece of {color} thread with {scissors} | "
        "unwinds the spool and cuts a length of {color} thread",
        "puts the {color} thread through the eye of the needle | "
        "threads the needle with the {color} thread on the first try",
        "holds the loose button in place on the {coat} | "
        "lays the loose button on the right spot of the {coat}",
        "pushes the threaded needle through the holes of the button | "
        "sews the button to the {coat} with several stitches",
        "ties a knot on the back and trims the {color} thread | "
        "makes a tight knot after the last stitch",
        "puts on the mended {coat} and buttons it up | "
        "tries the mended {coat} on and closes the new button",
    ),
    _activity(
        "Wrapping a present",
        "art",
        {
            "gift": "book, teddy bear, toy train, puzzle, music box",
            "paper": "striped paper, golden paper, silver paper, flowered paper",
        },
        "has bought a {gift} and a roll of {paper} | is at the table with a {gift} for a friend",
        "puts the {gift} into a box and closes the lid | "
        "lays the unwrapped {gift} in a small box with a lid",
        "rolls out the {paper} next to the box | "
        "unrolls the {paper} on the table and measures the box",
        "cuts a large piece from the roll of {paper} with {scissors} | "
        "takes {scissors} and cuts the {paper} to size",
        "folds the cut {paper} around the box and tapes it | "
        "wraps the box in the cut {paper} and adds some tape",
        "ties a ribbon around the wrapped box | "
        "winds a ribbon around the wrapped {gift} and makes a bow",
        "gives the present with the bow to a happy friend | "
        "writes a card and hands over the present with the bow",
    ),
    _activity(
        "Sending a letter",
        "desk",
        {
            "cousin": "cousin, friend, sister, brother, teacher",
            "envelope": "white envelope, brown envelope, large envelope",
        },
        "is sitting at a desk and thinks of {his} {cousin} | "
        "has put a blank page and the {envelope} on the desk",
        "writes a long letter to {his} {cousin} with {pen} | "
        "takes {pen} and fills the blank page with news for {his} {cousin}",
        "folds the written letter and puts it into the {envelope} | "
        "slips the written letter for {his} {cousin} into the {envelope}",
        "glues the flap of the {envelope} shut | seals the {envelope} with the letter inside",
        "writes the address of {his} {cousin} on the sealed {envelope} | "
        "puts a stamp and the address on the sealed {envelope}",
        "walks down the street to the mailbox with the stamped letter | "
        "carries the stamped {envelope} to the mailbox on the corner",
        "drops the stamped letter into the slot of the mailbox | "
        "pushes the {envelope} through the slot and walks home",
    ),
    _activity(
        "Borrowing a book",
        "desk",
        {
            "topic": "whales, stars, trains, volcanoes, dinosaurs, bees",
            "shelf": "top shelf, lowest shelf, corner shelf",
        },
        "is at the library to find a book about {topic} | "
        "is entering the library with a question about {topic}",
        "searches the computer for a book about {topic} | "
        "asks where to find the books about {topic}",
        "walks past the other books to the {shelf} | "
        "goes between the rows of books and stops at the {shelf}",
        "pulls a thick book about {topic} from the {shelf} | "
        "takes the only book about {topic} off the {shelf}",
        "carries the thick book about {topic} to the front desk | "
        "goes to the front desk with the thick book in {his} arms",
        "shows the library card, and the clerk stamps the book | "
        "waits while the clerk at the desk scans the book about {topic}",
        "takes the borrowed book about {topic} home | "
        "leaves the library with the borrowed book in {his} bag",
    ),
    _activity(
        "Putting up a tent",
        "camping",
        {"spot": "lake, river, old oak, meadow, waterfall", "color": "green, orange, blue, gray"},
        "has hiked to the {spot} with the {color} tent | "
        "is looking for a place to sleep near the {spot}",
        "unrolls the {color} tent on the flat ground near the {spot} | "
        "takes the folded {color} tent out of its bag",
        "pushes the long poles through the sleeves of the flat tent | "
        "puts the poles together and slides them into the flat {color} tent",
        "bends the poles and raises the {color} tent | "
        "pulls the {color} tent up by its poles until it stands",
        "ties the standing tent to pegs in the ground with {hammer} | "
        "hammers the pegs of the standing tent into the ground",
        "spreads the sleeping bag inside the firm {color} tent | "
        "lays a mat and a sleeping bag in the {color} tent",
        "makes {himself} comfortable in the sleeping bag and falls asleep | "
        "crawls into the sleeping bag and listens to the {spot} at night",
    ),
    _activity(
        "Making a campfire",
        "camping",
        {"food": "sausage, potato, marshmallow, fish, corn cob", "wood": "pine, birch, beech, dry"},
        "is at a campsite on a cold evening | is at the campsite and wants to roast a {food}",
        "collects {wood} sticks from the forest floor | "
        "walks through the forest and gathers an armful of {wood} sticks",
        "stacks the {wood} sticks inside a ring of stones | "
        "builds a small tower out of the gathered {wood} sticks",
        "lights the stacked {wood} sticks with {match} | "
        "strikes {match} and holds it to the stacked sticks",
        "~blows on the first small flame until the fire is big | "
        "feeds the small flame with more {wood} sticks",
        "~puts a raw {food} on a fork and roasts it over the fire | "
        "holds a raw {food} over the big fire until it is brown",
        "eats the roasted {food} beside the fire | "
        "lets the roasted {food} cool down and takes a bite",
        "pours a bucket of water over the glowing embers | "
        "puts out the glowing embers with sand and water",
    ),
    _activity(
        "Going fishing",
        "camping",
        {"water": "lake, river, pond, bay", "fish": "trout, perch, salmon, carp"},
        "is sitting on a pier at the {water} | is on the bank of the {water} with a fishing rod",
        "~opens a box and puts bait on the empty hook | "
        "takes some bait and fixes it to the empty hook",
        "~swings the rod and casts the line into the {water} | "
        "throws the baited hook far out into the {water}",
        "~sits still and watches the float on the {water} | "
        "holds the rod and waits for the float to move",
        "feels a strong pull and reels in the line | "
        "sees the float sink and winds up the tight line",
        "lifts a fat {fish} out of the {water} with {net} | "
        "pulls the {fish} to the shore and scoops it up with {net}",
        "frees the {fish} from the hook and lets it go | "
        "takes a photo of the {fish} and puts it back into the {water}",
    ),
)


def _sample_world(rng: random.Random, activity: Activity, person: Person) -> World:
    return World(
        person,
        activity,
        {name: rng.choice(values) for name, values in activity.objects.items()},
        {name: rng.choice(values) for name, values in TOOLS.items()},
    )


def _news(world: World) -> tuple[bool, bool]:
    """Whether the person, and whether the set of objects, is set aside for this activity.

    Both rules are fixed, so that no seed moves a combination from the questions to training. The
    one for objects takes every value of an object in some sets and leaves it in others.
    """
    activity = world.activity
    who = zlib.crc32(f"{activity.label}|{world.person.name}".encode())
    what = sum(values.index(world.objects[name]) for name, values in activity.objects.items())
    return who % HELD_OUT_ONE_IN == 0, what % HELD_OUT_ONE_IN == 2


def _decorate(rng: random.Random, predicate: str) -> str:
    """The predicate, at times with an adverb before it or an adjunct after it."""
    chance = rng.random()
    if chance < 0.25:
        return f"{rng.choice(ADVERBS)} {predicate}"
    linked = any(f" {word} " in predicate for word in ("and", "until", "while", "without"))
    if chance < 0.45 and not linked and len(predicate.split()) <= 11:
        return f"{predicate} {rng.choice(TAILS)}"
    return predicate


def _sentences(rng: random.Random, world: World, first: int, last: int) -> list[tuple[str, str]]:
    """The steps ``first`` to ``last`` as (subject, predicate); -1 stands for the scene."""
    sentences = []
    for number in range(first, last + 1):
        if number < 0:
            predicate = rng.choice(world.activity.scenes)
        else:
            predicate = _decorate(rng, rng.choice(world.activity.steps[number].wordings))
        subject = world.person.name
        if sentences:
            subject = rng.choice(CONNECTORS) + rng.choice(world.person.again)
        sentences.append((subject, predicate.format(**world.fields())))
    return sentences


def _prose(sentences: list[tuple[str, str]]) -> str:
    return " ".join(f"{who[0].upper()}{who[1:]} {what}." for who, what in sentences)


def document(rng: random.Random) -> str:
    """One training text: a passage of an activity, or all of it, as evaluation words it."""
    while True:
        world = _sample_world(rng, rng.choice(ACTIVITIES), rng.choice(PEOPLE))
        if not any(_news(world)):
            break
    end = len(world.activity.steps) - 1
    first = rng.randrange(-1, end)
    last = end if rng.random() < 0.3 else rng.randint(first + 1, min(first + 4, end))
    return f"{world.activity.label}: {_prose(_sentences(rng, world, first, last))}"


def _distractor(
    rng: random.Random, kind: str, world: World, context: str, step: int, template: str
) -> tuple[Step | None, str] | None:
    """An ending that is wrong as ``kind`` says, with its step if that is what is wrong."""
    activity, fields = world.activity, world.fields()
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    tools = [name for name in names if name in TOOLS]
    objects = [name for name in names if world.objects.get(name, "\n") in context]
    wrong_step = None
    untimely = [
        other
        for number, other in enumerate(activity.steps)
        # Next to a scene alone, which may be of any moment, no step comes too early.
        if step > 0 and abs(number - step) > 1 and not other.loose
    ]
    if kind == "order" and untimely:
        wrong_step = rng.choice(untimely)
    elif kind == "elsewhere":
        other = rng.choice([other for other in ACTIVITIES if other.domain != activity.domain])
        wrong_step = rng.choice(other.steps)
        fields = _sample_world(rng, other, world.person).fields()
    elif kind == "tool" and tools:
        alike = {tools[0]}.union(*(group for group in ALIKE if tools[0] in group))
        fields[tools[0]] = rng.choice(TOOLS[rng.choice([t for t in TOOLS if t not in alike])])
    elif kind == "object" and objects:
        name = rng.choice(objects)
        fields[name] = rng.choice([v for v in activity.objects[name] if v not in context])
    elif kind == "agent" and "himself" in names:
        fields.update(world.person.other().pronouns())
    else:
        return None
    if wrong_step:
        template = _decorate(rng, rng.choice(wrong_step.wordings))
    return wrong_step, template.format(**fields) + "."


def _question(rng: random.Random, activity: Activity, rank: int) -> dict[str, object] | None:
    """A held-out question whose gold ending is longer than ``rank`` others, if luck has it."""
    world = _sample_world(rng, activity, rng.choice(PEOPLE))
    if not all(_news(world)):
        return None
    step = rng.choice([0, *range(1, len(activity.steps)), *range(1, len(activity.steps))])
    context = _prose(_sentences(rng, world, max(-1, step - rng.randint(1, 2)), step - 1))
    template = _decorate(rng, rng.choice(activity.steps[step].wordings))
    gold = template.format(**world.fields()) + "."
    drafts: list[tuple[Step | None, str]] = [(activity.steps[step], gold)]
    for kind in rng.sample(KINDS, len(KINDS)):
        draft = _distractor(rng, kind, world, context, step, template)
        if draft is None or len(drafts) == CHOICES:
            continue
        if not any(draft[1] == ending or draft[0] and draft[0] == of for of, ending in drafts):
            drafts.append(draft)
    endings = [ending for _, ending in drafts]
    fitting = all(4 <= len(ending.split()) <= 16 for ending in endings)
    shorter = sum(len(ending) < len(gold) for ending in endings)
    if len(endings) < CHOICES or not fitting or shorter != rank:
        return None
    return {
        "activity_label": activity.label,
        "ctx_a": context,
        "ctx_b": rng.choice(CONNECTORS) + rng.choice(world.person.again),
        "endings": endings,
    }


def questions(rng: random.Random, count: int) -> Iterator[dict[str, object]]:
    """Held-out questions in HellaSwag's format; lengths and labels are balanced."""
    labels = [number % CHOICES for number in range(count)]
    ranks = list(labels)
    topics = [ACTIVITIES[number % len(ACTIVITIES)] for number in range(count)]
    for deck in (labels, ranks, topics):
        rng.shuffle(deck)
    seen = set()
    for number, (label, rank, activity) in enumerate(zip(labels, ranks, topics, strict=True)):
        draft = None
        while draft is None or draft["ctx_a"] in seen:
            draft = _question(rng, activity, rank)
        seen.add(draft["ctx_a"])
        gold, *others = draft["endings"]
        yield {
            "ind": number,
            "activity_label": draft["activity_label"],
            "ctx_a": draft["ctx_a"],
            "ctx_b": draft["ctx_b"],
            "ctx": f"{draft['ctx_a']} {draft['ctx_b']}",
            "endings": [*others[:label], gold, *others[label:]],
            "label": label,
            "split": "val",
            "source_id": f"demo~{number}",
        }
