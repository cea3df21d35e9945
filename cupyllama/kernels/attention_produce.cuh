// The warps of attention_sm90.cu that copy: which piece of work comes next, and its queries, keys
// and values on their way to shared memory.

struct Lists {
    const int4 *items, *steps;
    const int *key_index, *positions;
    int item_count;
};

// The item and head of piece `number`.
__device__ inline int2 item_and_head(int number, int items)
{
    const int section = number / (SECTION * NUM_HEADS) * SECTION;
    const int block = min(SECTION, items - section) * CHUNK;  // pieces of CHUNK heads of it
    const int place = number - section * NUM_HEADS;
    const int chunk = place / block, rest = place % block;
    return make_int2(section + rest / CHUNK, chunk * CHUNK + rest % CHUNK);
}

// The positions and queries of an item.
__device__ inline void fetch_queries(
    Room room, const storage_t *qkv, const int *positions, int4 item, int head)
{
    const int thread = threadIdx.x - CONSUMERS, row = thread / UNITS, unit = thread % UNITS;
    const storage_t *q = qkv + (size_t)item.x * WIDTH + head * HEAD_DIM + unit * 8;
    if (thread < item.y)
        copy_word_async(room.positions() + 4 * thread, positions + item.x + thread);
#pragma unroll 4
    for (int first = 0; first < ROWS; first += PASS) {
        const bool real = first + row < item.y;
        copy_async(room.base + swizzled(first + row, unit, ROWS),
                   q + (size_t)(real ? first + row : 0) * WIDTH, real);
    }
}

// The first `count` rows of a step's keys or values, zeros from `real` on, from rows of `from`.
// place: of the row that this lane has looked up.
__device__ inline void gather(unsigned to, const storage_t *from, int place, int real, int count)
{
    const int thread = threadIdx.x - CONSUMERS, row = thread / UNITS, unit = thread % UNITS;
    for (int first = 0; first < count; first += 32) {
#pragma unroll
        for (int i = 0; i < 32 / PASS; i++) {
            const int source = (first / PASS + i) * WARP_ROWS + thread % 32 / UNITS;
            const int from_row = __shfl_sync(ALL_LANES, place, source);
            const int key = first + i * PASS + row;
            copy_async(to + swizzled(key, unit, KEYS), from + (size_t)from_row * KEY_WIDTH,
                       key < real);
        }
    }
}

__device__ inline void produce(
    Room room, const storage_t *qkv, const storage_t *cache, const TensorMap &map, Lists lists,
    int *counter)
{
    const int thread = threadIdx.x - CONSUMERS, lane = thread % 32, unit = thread % UNITS;
    // The key of a step whose place this lane looks up, for its warp; thread 0's is the first.
    const int looked_up = lane / WARP_ROWS * PASS + thread / 32 * WARP_ROWS + lane % WARP_ROWS;
    const int pieces = lists.item_count * NUM_HEADS;
    auto place_of = [&](int4 step) {
        return lists.key_index[step.x + min(looked_up, step.y - 1)];
    };
    Turn turn = {0, 1};
    int ticket = blockIdx.x, next_ticket = blockIdx.x + gridDim.x;
    int2 where = item_and_head(min(ticket, pieces - 1), lists.item_count);
    int4 item = lists.items[where.x];
    int4 step = lists.steps[item.z], following = lists.steps[item.z + min(1, item.w - 1)];
    int place = place_of(step);
    for (unsigned round = 0;; round++) {
        const bool end = ticket >= pieces;
        const int2 next_where = item_and_head(min(next_ticket, pieces - 1), lists.item_count);
        const int4 next_item = lists.items[next_where.x];

        wait(room.queries_empty(), round & 1 ^ 1);
        if (thread == 0) {
            store_words(room.piece(), item.x, end ? 0 : item.y, item.w, where.y);
            arrive(room.queries_full());
        }
        if (!end) fetch_queries(room, qkv, lists.positions, item, where.y);
        arrive_when_copied(room.queries_full());
        if (end) return;

        const int column = FIRST_KEY + where.y / (NUM_HEADS / NUM_KV_HEADS) * HEAD_DIM;
        // All of an item's keys in one step may be multiplied by fewer columns than KEYS.
        const int fewest = GROUPS == 1 && item.w == 1 ? 64 : KEYS;
        auto fetch = [&](int part) {  // 0: the keys of `step`, 1: its values
            const int from = column + part * NUM_KV_HEADS * HEAD_DIM;
            const unsigned full = room.full(turn.at), to = room.buffer(turn.at);
            const bool boxes = BOXES && step.w & CONTIGUOUS;
            wait(room.empty(turn.at), turn.parity);
            if (thread == 0) {
                if (part == 0) store_words(room.step(turn.at), step.z, step.y, step.w, 0);
                if (boxes) {
                    arrive_expecting(full, PART);
#pragma unroll
                    for (int half = 0; half < HEAD_DIM / 64; half++)
                        copy_box(to + half * KEYS * 128, map, place, 2 * from + half * 128, full);
                } else {
                    arrive(full);
                }
            }
            if (!boxes) {
                const storage_t *rows = (CACHED ? cache : qkv) + from + unit * 8;
                gather(to, rows, place, step.y, max(step.y, fewest));
            }
            // Those who have copied nothing arrive as well.  Else a warp that is late at its wait
            // may find the barrier two phases on, which looks like none, and wait for good.
            arrive_when_copied(full);
            turn.next();
        };

        int taken = 0;
        for (int left = item.w; left > 0; left--) {
            // What comes next is looked up before this step is copied; the keys of the next piece
            // after it, for its first step is only just read.
            int4 after;
            int next_place = 0;
            if (left == 1) {
                if (thread == 0) taken = atomicAdd(counter, 1);
                following = lists.steps[next_item.z];
                after = lists.steps[next_item.z + min(1, next_item.w - 1)];
            } else {
                after = lists.steps[item.z + item.w - max(left - 2, 1)];
                next_place = place_of(following);
            }
            fetch(0);
            fetch(1);
            if (left == 1) next_place = place_of(following);
            step = following;
            following = after;
            place = next_place;
        }

        // The first two pieces are given by blockIdx.x; the counter is left at 0 for the next.
        if (thread == 0) {
            if (taken == pieces - 1) *counter = 0;
            store_word(room.tickets() + 4 * (round & 1), taken + 2 * (int)gridDim.x);
        }
        meet(PRODUCERS_MEET, PRODUCERS);
        ticket = next_ticket;
        next_ticket = load_word(room.tickets() + 4 * (round & 1));
        where = next_where;
        item = next_item;
    }
}
