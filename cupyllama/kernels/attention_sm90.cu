// attention for compute capability 9.0: out = softmax(q k^T / sqrt(HEAD_DIM)) v, causal, packed
//
// An item is up to ROWS consecutive queries; a piece of work is one head of an item, and its keys
// come in steps of KEYS.  Each block stays on its multiprocessor and takes pieces by a counter
// until none is left: PRODUCERS threads gather queries, keys and values through key_index by
// cp.async into shared memory, swizzled as wgmma reads it, up to STAGES steps ahead and on into the
// next piece, while each of the GROUPS other warpgroups multiplies 64 queries, held in registers.
// The scores of a step are computed while the values of the step before are multiplied; scores and
// probabilities live in registers and are never written; softmax is online, in float.
//
// SECTION neighbouring items, which share keys, run together for CHUNK heads: their keys and values
// are read from memory once and then from the L2 cache.
//
// A step may be of one segment's keys or of a prefix that several segments of an item share: only
// the rows first..last of the item see it.  A query's bits depend on nothing but its row: each row
// sees its keys in steps of KEYS from its key 0, and a key it must not see adds exp2(-infinity) = 0
// and moves no peak.  (What is not finite does spread, by 0 * infinity, to the rows of its item.)
//
// With CACHED=1, key_index is of rows of a cache, each keys and then values; else it is of qkv's.
#include "hopper.cuh"

constexpr int CONSUMERS = 128 * GROUPS;
constexpr int PRODUCERS = 128;
constexpr int ROWS = 64 * GROUPS;
constexpr int WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;  // of a row of qkv
constexpr int KEY_WIDTH = CACHED ? 2 * NUM_KV_HEADS * HEAD_DIM : WIDTH;
constexpr int UNITS = HEAD_DIM / 8;        // 16 bytes each, of a row of one head
constexpr int PASS = PRODUCERS / UNITS;    // rows that the producers fetch at a time
constexpr int PART = KEYS * HEAD_DIM * 2;  // bytes of a step's keys, or of its values
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int BARRIERS = QUERY_BYTES + 2 * STAGES * PART;  // where they lie in shared memory
constexpr int RECORDS = BARRIERS + 8 * (4 * STAGES + 2);   // what producers tell consumers
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "");
static_assert(KEYS == 64, "what multiply() is written for");
static_assert(KEYS % PASS == 0 && NUM_HEADS % CHUNK == 0 && RECORDS % 16 == 0, "");

#include "attention_softmax.cuh"

// Places in shared memory, as addresses of it.
struct Room {
    unsigned base;
    __device__ unsigned keys(int stage) const { return base + QUERY_BYTES + 2 * stage * PART; }
    __device__ unsigned values(int stage) const { return keys(stage) + PART; }
    __device__ unsigned keys_full(int stage) const { return base + BARRIERS + 8 * stage; }
    __device__ unsigned values_full(int stage) const { return keys_full(STAGES + stage); }
    __device__ unsigned keys_empty(int stage) const { return keys_full(2 * STAGES + stage); }
    __device__ unsigned values_empty(int stage) const { return keys_full(3 * STAGES + stage); }
    __device__ unsigned queries_full() const { return keys_full(4 * STAGES); }
    __device__ unsigned queries_empty() const { return keys_full(4 * STAGES + 1); }
    __device__ unsigned item() const { return base + RECORDS; }
    __device__ unsigned tickets() const { return base + RECORDS + 16; }
    __device__ unsigned step(int stage) const { return base + RECORDS + 32 + 8 * stage; }
};

// A stage of shared memory and the parity of its barriers in the round that comes.
struct Turn {
    int stage;
    unsigned parity;
    __device__ void next()
    {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The item and head of piece `number`.
__device__ inline int2 item_and_head(int number, int items)
{
    const int section = number / (SECTION * NUM_HEADS) * SECTION;
    const int block = min(SECTION, items - section) * CHUNK;  // pieces of CHUNK heads of the section
    const int place = number - section * NUM_HEADS;
    const int chunk = place / block, rest = place % block;
    return make_int2(section + rest / CHUNK, chunk * CHUNK + rest % CHUNK);
}

__device__ inline void produce(
    Room room, const storage_t *qkv, const storage_t *cache, const int4 *items, const int4 *steps,
    const int *key_index, int *counter, int item_count)
{
    const int thread = threadIdx.x - CONSUMERS, row = thread / UNITS, unit = thread % UNITS;
    const int pieces = item_count * NUM_HEADS;
    Turn turn = {0, 1};
    int ticket = blockIdx.x;
    for (unsigned round = 0;; round++) {
        int taken = 0;
        if (thread == 0 && ticket < pieces) taken = atomicAdd(counter, 1);
        const int2 where = item_and_head(min(ticket, pieces - 1), item_count);
        int4 item = items[where.x];
        if (ticket >= pieces) item.y = 0;  // no queries: the end

        wait(room.queries_empty(), round & 1 ^ 1);
        if (thread == 0) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                         :: "r"(room.item()), "r"(item.x), "r"(item.y), "r"(item.w), "r"(where.y)
                         : "memory");
            arrive(room.queries_full());
        }
        const storage_t *q = qkv + (size_t)item.x * WIDTH + where.y * HEAD_DIM + unit * 8;
#pragma unroll
        for (int first = 0; first < ROWS; first += PASS) {
            const bool real = first + row < item.y;
            copy_async(room.base + swizzled(first + row, unit, ROWS),
                       q + (size_t)(real ? first + row : 0) * WIDTH, real);
        }
        arrive_when_copied(room.queries_full());
        if (ticket >= pieces) return;

        const int kv_head = where.y / (NUM_HEADS / NUM_KV_HEADS);
        const storage_t *k =
            (CACHED ? cache + kv_head * HEAD_DIM : qkv + (NUM_HEADS + kv_head) * HEAD_DIM) +
            unit * 8;
        int4 step = steps[item.z];
        int place[KEYS / PASS];
#pragma unroll
        for (int i = 0; i < KEYS / PASS; i++)
            place[i] = key_index[step.x + min(i * PASS + row, step.y - 1)];
        for (int left = item.w; left > 0; left--) {
            const int4 following = steps[item.z + item.w - max(left - 1, 1)];
            wait(room.keys_empty(turn.stage), turn.parity);
            if (thread == 0) {
                asm volatile("st.shared.v2.b32 [%0], {%1, %2};"
                             :: "r"(room.step(turn.stage)), "r"(step.z), "r"(step.w) : "memory");
                arrive(room.keys_full(turn.stage));
            }
#pragma unroll
            for (int i = 0; i < KEYS / PASS; i++)
                copy_async(room.keys(turn.stage) + swizzled(i * PASS + row, unit, KEYS),
                           k + (size_t)place[i] * KEY_WIDTH, i * PASS + row < step.y);
            arrive_when_copied(room.keys_full(turn.stage));
            wait(room.values_empty(turn.stage), turn.parity);
#pragma unroll
            for (int i = 0; i < KEYS / PASS; i++)
                copy_async(room.values(turn.stage) + swizzled(i * PASS + row, unit, KEYS),
                           k + (size_t)place[i] * KEY_WIDTH + NUM_KV_HEADS * HEAD_DIM,
                           i * PASS + row < step.y);
            arrive_when_copied(room.values_full(turn.stage));
            turn.next();
            step = following;
#pragma unroll
            for (int i = 0; i < KEYS / PASS; i++)
                place[i] = key_index[step.x + min(i * PASS + row, step.y - 1)];
        }

        // The first pieces are given by blockIdx.x; the counter is left at 0 for the next launch.
        if (thread == 0) {
            if (taken == pieces - 1) *counter = 0;
            asm volatile("st.shared.b32 [%0], %1;"
                         :: "r"(room.tickets() + 4 * (round & 1)), "r"(taken + (int)gridDim.x)
                         : "memory");
        }
        asm volatile("bar.sync 1, %0;" :: "n"(PRODUCERS) : "memory");
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(ticket) : "r"(room.tickets() + 4 * (round & 1)) : "memory");
    }
}

// s = q k^T for 64 queries and KEYS keys.
__device__ inline void multiply_keys(
    float (&s)[KEYS / 2], const unsigned (&q)[HEAD_DIM / 16][4], unsigned keys)
{
    const unsigned low = keys / 16 | 1 << 16;
    begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
        multiply<0>(s, q[step], matrix(low + step / 4 * KEYS * 8 + step % 4 * 2), step > 0);
    commit();
}

// o += p v, or o = p v.
__device__ inline void multiply_values(
    float (&o)[HEAD_DIM / 2], const unsigned (&p)[KEYS / 16][4], unsigned values, int accumulate)
{
    const unsigned low = values / 16 | KEYS * 8 << 16;
    begin();
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
        multiply<1>(o, p[step], matrix(low + step * 128), step > 0 || accumulate);
    commit();
}

// This warp's queries, as wgmma takes them.
__device__ inline void load_queries(unsigned (&q)[HEAD_DIM / 16][4], Room room)
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        const unsigned at = room.base + swizzled(row, 2 * step + lane / 16, ROWS);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[step][0]), "=r"(q[step][1]), "=r"(q[step][2]), "=r"(q[step][3])
                     : "r"(at) : "memory");
    }
    release(room.queries_empty());
}

__device__ inline void consume(storage_t *out, Room room, const int *positions, float scale)
{
    const int group = threadIdx.x / 128, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    Turn turn = {0, 0};
    float o[HEAD_DIM / 2] = {};
    for (unsigned round = 0;; round++) {
        wait(room.queries_full(), round & 1);
        int place, rows, steps, head;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(place), "=r"(rows), "=r"(steps), "=r"(head)
                     : "r"(room.item()) : "memory");
        if (rows == 0) return;
        const int position[2] = {positions[place + min(row, rows - 1)],
                                 positions[place + min(row + 8, rows - 1)]};
        unsigned q[HEAD_DIM / 16][4];
        load_queries(q, room);

        const int first_row = 64 * group, last_row = min(first_row + 64, rows);
        int2 step;
        auto wanted = [&]() {  // whether this warpgroup has rows that see the next step
            wait_for_matrix(room.keys_full(turn.stage), turn.parity);
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                         : "=r"(step.x), "=r"(step.y) : "r"(room.step(turn.stage)) : "memory");
            return (step.y & 0xffff) < last_row && step.y >> 16 > first_row;
        };
        float s[KEYS / 2] = {}, shrink[2];
        float peak[2] = {-infinity(), -infinity()}, total[2] = {};
        unsigned p[KEYS / 16][4];
        int accumulate = 0;
        while (true) {
            for (; steps > 0 && !wanted(); steps--) {
                release(room.keys_empty(turn.stage));
                wait(room.values_full(turn.stage), turn.parity);
                release(room.values_empty(turn.stage));
                turn.next();
            }
            if (steps == 0) break;
            multiply_keys(s, q, room.keys(turn.stage));
            finish<0>(s);
            release(room.keys_empty(turn.stage));
            hide(s, step, position, row, rows);
            soften(s, shrink, peak, total, scale);
            round_off(p, s);
            if (accumulate) rescale(o, shrink);
            Turn last = turn;
            turn.next();
            for (steps--; steps > 0 && wanted(); steps--) {
                multiply_keys(s, q, room.keys(turn.stage));
                // The last step's values are there: they were asked for before these keys.
                multiply_values(o, p, room.values(last.stage), accumulate);
                finish<1>(s);
                release(room.keys_empty(turn.stage));
                hide(s, step, position, row, rows);
                soften(s, shrink, peak, total, scale);
                pin(s);
                // One wait for both branches would be moved before soften by the compiler.
                if (moved(shrink)) {
                    finish<0>(o);
                    rescale(o, shrink);
                } else {
                    finish<0>(o);
                }
                release(room.values_empty(last.stage));
                round_off(p, s);
                accumulate = 1;
                last = turn;
                turn.next();
            }
            wait_for_matrix(room.values_full(last.stage), last.parity);
            multiply_values(o, p, room.values(last.stage), accumulate);
            finish<0>(o);
            release(room.values_empty(last.stage));
            accumulate = 1;
        }
        if (!accumulate) continue;
        write(out + ((size_t)place * NUM_HEADS + head) * HEAD_DIM, o, total, row, rows);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 2 / GROUPS) attention_sm90(
    storage_t *__restrict__ out,        // (tokens, NUM_HEADS * HEAD_DIM)
    const storage_t *__restrict__ qkv,  // (tokens, WIDTH): q, then k, then v
    const int4 *__restrict__ items,     // (items,) packed place of query 0, queries, step 0, steps
    // (steps,) key_index of key 0, keys, position of key 0, first row that sees one | end << 16
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
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(room.keys_full(stage), PRODUCERS + 1);
            init_barrier(room.values_full(stage), PRODUCERS);
            init_barrier(room.keys_empty(stage), CONSUMERS / 32);
            init_barrier(room.values_empty(stage), CONSUMERS / 32);
        }
        init_barrier(room.queries_full(), PRODUCERS + 1);
        init_barrier(room.queries_empty(), CONSUMERS / 32);
    }
    __syncthreads();
    // Registers move from those who only copy to those who multiply.
    if (threadIdx.x >= CONSUMERS) {
        give_registers_back<GROUPS == 1 ? 56 : 88>();
        produce(room, qkv, cache, items, steps, key_index, counter, item_count);
    } else {
        take_registers<GROUPS == 1 ? 200 : 208>();
        consume(out, room, positions, scale);
    }
}
