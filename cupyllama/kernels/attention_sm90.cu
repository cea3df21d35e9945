// attention for compute capability 9.0: out = softmax(q k^T / sqrt(HEAD_DIM)) v, causal, packed
//
// An item is up to ROWS consecutive queries; a piece of work is one head of an item, and its keys
// come in steps of KEYS.  Each block stays on its multiprocessor and takes pieces by a counter
// until none is left.  PRODUCERS threads fill a ring of BUFFERS buffers, each the keys of a step or
// its values, swizzled as wgmma reads it, as far ahead as there is room and on into the next piece.
// Each of the GROUPS other warpgroups multiplies 64 queries, held in registers.  Scores and
// probabilities live in registers and are never written; softmax is online, in float.
//
// GROUPS=1 is for short rows, of a step or a few: two such blocks share a multiprocessor, and each
// multiplies while the other softens.  All is gathered through key_index by cp.async.  A piece of
// one step is multiplied by no more columns than it needs.
//
// GROUPS=2 is for long rows: the scores of a step are computed while the values of the step before
// are multiplied, and the two warpgroups take turns at the matrix units.  A step whose keys lie
// side by side comes by the copy engine, in boxes; any other is gathered.  8,192 tokens of prompts
// of 1,500 with four endings of 30, at 7B: 245 us; 303 when all were gathered, in steps of 64.
//
// SECTION neighbouring items, which share keys, run together for CHUNK heads: their keys and values
// are read from memory once and then from the L2 cache.
//
// A step may be of one segment's keys or of a prefix that several segments of an item share: only
// some rows of the item see it.  A query's bits depend on nothing but its row, neither on GROUPS:
// each row sees its keys in steps of KEYS from its key 0, and a key it must not see adds
// exp2(-infinity) = 0 and moves no peak.  (What is not finite does spread, by 0 * infinity, to the
// rows of its item that its step is multiplied for.)
//
// With CACHED=1, key_index is of rows of a cache, each keys and then values; else it is of qkv's.
#include "hopper.cuh"

constexpr int CONSUMERS = 128 * GROUPS;
constexpr int PRODUCERS = 128;
constexpr int ROWS = 64 * GROUPS;
constexpr bool BOXES = GROUPS == 2;  // whether the copy engine fetches what lies side by side
constexpr int WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;  // of a row of qkv
constexpr int KEY_WIDTH = CACHED ? 2 * NUM_KV_HEADS * HEAD_DIM : WIDTH;
constexpr int FIRST_KEY = CACHED ? 0 : NUM_HEADS * HEAD_DIM;  // column of the first head's keys
constexpr int UNITS = HEAD_DIM / 8;        // 16 bytes each, of a row of one head
constexpr int PASS = PRODUCERS / UNITS;    // rows that the producers fetch at a time
constexpr int WARP_ROWS = 32 / UNITS;      // of these, a warp's
constexpr int PART = KEYS * HEAD_DIM * 2;  // bytes of a step's keys, or of its values
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int POSITIONS = QUERY_BYTES + BUFFERS * PART;  // where they lie in shared memory
constexpr int BARRIERS = POSITIONS + ROWS * 4;
constexpr int RECORDS = BARRIERS + 8 * (2 * BUFFERS + 2);  // what producers tell consumers
// Registers of a thread: with those that the producers give back, all that a multiprocessor has.
constexpr int PRODUCER_REGISTERS = 56;
constexpr int CONSUMER_REGISTERS = GROUPS == 1 ? 200 : 224;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "");
static_assert(KEYS == PRODUCERS, "each looks up one key of a step");
static_assert(NUM_HEADS % CHUNK == 0 && RECORDS % 16 == 0, "");

#include "attention_shared.cuh"

// What a thread knows of the rows of an item that it works on: row and row + 8 of its warp's 16.
struct Rows {
    int row, count, position[2];
};

// What it knows of a step: the position of the first key, the keys, and of the item's rows the
// first to see one | CONTIGUOUS | the end << 16.
struct Step {
    int position, keys, rows;
    __device__ int first() const { return rows & CONTIGUOUS - 1; }
    __device__ int end() const { return rows >> 16; }
    // Whether it came by cp.async, of which wgmma knows behind a fence alone.
    __device__ bool gathered() const { return !(BOXES && rows & CONTIGUOUS); }
};

#include "attention_softmax.cuh"
#include "attention_produce.cuh"

// s = q k^T for 64 queries and COUNT keys.
template <int COUNT>
__device__ inline void multiply_keys(
    float (&s)[COUNT / 2], const unsigned (&q)[HEAD_DIM / 16][4], unsigned keys)
{
    const unsigned low = keys / 16 | 1 << 16;
    begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
        multiply<0>(s, q[step], matrix(low + step / 4 * KEYS * 8 + step % 4 * 2), step > 0);
    commit();
}

// o += p v, or o = p v.
template <int COUNT>
__device__ inline void multiply_values(
    float (&o)[HEAD_DIM / 2], const unsigned (&p)[COUNT / 16][4], unsigned values, int accumulate)
{
    const unsigned low = values / 16 | KEYS * 8 << 16;
    begin();
#pragma unroll
    for (int step = 0; step < COUNT / 16; step++)
        multiply<1>(o, p[step], matrix(low + step * 128), step > 0 || accumulate);
    commit();
}

// This warp's queries, as wgmma takes them.
__device__ inline void load_queries(unsigned (&q)[HEAD_DIM / 16][4], Room room)
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
        load_matrix(q[step], room.base + swizzled(row, 2 * step + lane / 16, ROWS));
    release(room.queries_empty());
}

// Waits for the keys of the next step.
__device__ inline Step next_step(Room room, Turn turn)
{
    wait(room.full(turn.at), turn.parity);
    const int4 words = load_words(room.step(turn.at));
    const Step step = {words.x, words.y, words.z};
    if (step.gathered()) see_copies();
    return step;
}

// Waits for values, which come as the keys of their step did.
__device__ inline void wait_for_values(Room room, Turn turn, bool gathered)
{
    wait(room.full(turn.at), turn.parity);
    if (gathered) see_copies();
}

// This warp needs the buffer no more.
__device__ inline void leave(Room room, Turn &turn)
{
    release(room.empty(turn.at));
    turn.next();
}

// The steps of an item for the one warpgroup of a block, one after the other: o and total.  COUNT:
// no step has more keys.
template <int COUNT>
__device__ inline void multiply_alone(
    float (&o)[HEAD_DIM / 2], float (&total)[2], const unsigned (&q)[HEAD_DIM / 16][4], Room room,
    Turn &turn, Step step, int steps, const Rows &rows, float scale)
{
    float shrink[2], peak[2] = {-infinity(), -infinity()};
    for (int number = 0; number < steps; number++) {
        if (number) step = next_step(room, turn);
        float s[COUNT / 2];
        multiply_keys<COUNT>(s, q, room.buffer(turn.at));
        finish<0>(s);
        leave(room, turn);
        hide<COUNT>(s, step, rows);
        soften<COUNT>(s, shrink, peak, total, scale);
        if (number && moved(shrink)) rescale(o, shrink);
        unsigned p[COUNT / 16][4];
        round_off<COUNT>(p, s);
        wait_for_values(room, turn, true);
        multiply_values<COUNT>(o, p, room.buffer(turn.at), number);
        finish<0>(o);
        leave(room, turn);
    }
}

// The two warpgroups have the matrix units in turn, for a step each: one multiplies while the other
// softens.  For a step that it passes over, a warpgroup takes its turn as well: they stay in step.
__device__ inline void wait_for_units(int group) { meet(GROUP_TURN + group, CONSUMERS); }
__device__ inline void pass_units(int group) { announce(GROUP_TURN + 1 - group, CONSUMERS); }

// The steps of an item for one of two warpgroups: o and total of its rows, if it has any.
__device__ inline void multiply_in_turns(
    float (&o)[HEAD_DIM / 2], float (&total)[2], const unsigned (&q)[HEAD_DIM / 16][4], Room room,
    Turn &turn, int steps, int group, const Rows &rows, float scale)
{
    const int first_row = 64 * group, end_row = min(first_row + 64, rows.count);
    Step step;
    auto wanted = [&]() {  // whether this warpgroup has rows that see the next step
        step = next_step(room, turn);
        return step.first() < end_row && step.end() > first_row;
    };
    float s[KEYS / 2], shrink[2], peak[2] = {-infinity(), -infinity()};
    unsigned p[KEYS / 16][4];
    int accumulate = 0;
    while (true) {
        for (; steps > 0 && !wanted(); steps--) {
            wait_for_units(group);
            pass_units(group);
            leave(room, turn);
            wait(room.full(turn.at), turn.parity);
            leave(room, turn);
        }
        if (steps == 0) break;
        wait_for_units(group);
        multiply_keys<KEYS>(s, q, room.buffer(turn.at));
        pass_units(group);
        finish<0>(s);
        leave(room, turn);
        hide<KEYS>(s, step, rows);
        soften<KEYS>(s, shrink, peak, total, scale);
        round_off<KEYS>(p, s);
        if (accumulate) rescale(o, shrink);
        Turn values = turn;
        bool gathered = step.gathered();
        turn.next();
        for (steps--; steps > 0 && wanted(); steps--) {
            wait_for_units(group);
            multiply_keys<KEYS>(s, q, room.buffer(turn.at));
            wait_for_values(room, values, gathered);
            multiply_values<KEYS>(o, p, room.buffer(values.at), accumulate);
            pass_units(group);
            finish<1>(s);
            leave(room, turn);
            hide<KEYS>(s, step, rows);
            soften<KEYS>(s, shrink, peak, total, scale);
            pin(s);
            // One wait for both branches would be moved before soften by the compiler.
            if (moved(shrink)) {
                finish<0>(o);
                rescale(o, shrink);
            } else {
                finish<0>(o);
            }
            release(room.empty(values.at));
            round_off<KEYS>(p, s);
            accumulate = 1;
            values = turn;
            gathered = step.gathered();
            turn.next();
        }
        wait_for_values(room, values, gathered);
        multiply_values<KEYS>(o, p, room.buffer(values.at), accumulate);
        finish<0>(o);
        release(room.empty(values.at));
        accumulate = 1;
    }
}

__device__ inline void consume(storage_t *out, Room room, float scale)
{
    const int group = GROUPS == 1 ? 0 : threadIdx.x / 128;
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    Turn turn = {0, 0};
    if (group == 1) pass_units(group);
    for (unsigned round = 0;; round++) {
        wait(room.queries_full(), round & 1);
        const int4 piece = load_words(room.piece());  // place, rows, steps, head
        if (piece.y == 0) return;
        const Rows rows = {row, piece.y,
                           {load_word(room.positions() + 4 * min(row, piece.y - 1)),
                            load_word(room.positions() + 4 * min(row + 8, piece.y - 1))}};
        unsigned q[HEAD_DIM / 16][4];
        load_queries(q, room);
        float o[HEAD_DIM / 2], total[2] = {};
        if (GROUPS == 2) {
            multiply_in_turns(o, total, q, room, turn, piece.z, group, rows, scale);
        } else {
            const Step step = next_step(room, turn);
            if (piece.z == 1 && step.keys <= 64)
                multiply_alone<64>(o, total, q, room, turn, step, 1, rows, scale);
            else if (piece.z == 1 && step.keys <= 96)
                multiply_alone<96>(o, total, q, room, turn, step, 1, rows, scale);
            else
                multiply_alone<128>(o, total, q, room, turn, step, piece.z, rows, scale);
        }
        if (64 * group < piece.y)
            write(out + ((size_t)piece.x * NUM_HEADS + piece.w) * HEAD_DIM, o, total, rows);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 2 / GROUPS) attention_sm90(
    storage_t *__restrict__ out,        // (tokens, NUM_HEADS * HEAD_DIM)
    const storage_t *__restrict__ qkv,  // (tokens, WIDTH): q, then k, then v
    const __grid_constant__ TensorMap map,  // of what key_index is of, in boxes of KEYS rows
    const int4 *__restrict__ items,     // (items,) packed place of query 0, queries, step 0, steps
    // (steps,) key_index of key 0, keys, position of key 0, rows as of Step
    const int4 *__restrict__ steps,
    const int *__restrict__ key_index,  // (keys,)
    const int *__restrict__ positions,  // (tokens,)
    int *__restrict__ counter,          // (1,) 0, and 0 again in the end
    int item_count,
    float scale,                        // log2(e) / sqrt(HEAD_DIM)
    const storage_t *__restrict__ cache)  // (slots, KEY_WIDTH): k, then v; unused if not CACHED
{
    extern __shared__ __align__(1024) uint4 memory[];
    const Room room = {(unsigned)__cvta_generic_to_shared(memory)};
    if (room.base % 1024) __trap();  // the swizzle counts from multiples of 1024
    const Lists lists = {items, steps, key_index, positions, item_count};
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) {
            init_barrier(room.full(i), PRODUCERS + 1);
            init_barrier(room.empty(i), CONSUMERS / 32);
        }
        init_barrier(room.queries_full(), PRODUCERS + 1);
        init_barrier(room.queries_empty(), CONSUMERS / 32);
        if (BOXES) publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        give_registers_back<PRODUCER_REGISTERS>();
        produce(room, qkv, cache, map, lists, counter);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(out, room, scale);
    }
}
