// attention of one query a row over its cache, and the row's new key and value put there:
//     cache[slot of position] = k, v;  out = softmax(q k^T / sqrt(HEAD_DIM)) v over 0 .. position
//
// What is read is the cache, once for all HEADS queries of a block.  The new key and value are taken
// from qkv, so nothing waits for them; scores are never written; softmax is online, in float.
//
// A warp takes CHUNK keys: LANES lanes hold a key, PACK_WIDTH numbers of it each or several times
// that, and with AT_ONCE keys and values each on their way.  A block takes SPAN chunks and adds
// them up in their order, then the spans.  The grid is (kv heads * parts of their queries, rows,
// splits): the spans of a row are dealt out to the splits, and the one that is through last adds up
// what the others have written.
//
// A row's bits depend on nothing but the row: chunks and spans begin at multiples of their size, and
// are added up in order, by whatever warp, block or split they were computed.
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;  // of a row of qkv
constexpr int KEY_WIDTH = 2 * NUM_KV_HEADS * HEAD_DIM;            // of a row of the cache
constexpr int PARTS = NUM_HEADS / NUM_KV_HEADS / HEADS;           // of the queries of a kv head
constexpr int PACK_WIDTH = pack_width(HEAD_DIM);
constexpr int PACKS = HEAD_DIM / PACK_WIDTH;

__device__ constexpr int power_of_two(int n)  // that is not less
{
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

constexpr int LANES = PACKS > 32 ? 32 : power_of_two(PACKS);
constexpr int SLOTS = (PACKS + LANES - 1) / LANES;  // packs of a key that a lane has
constexpr int NUMBERS = SLOTS * PACK_WIDTH;
constexpr int GROUPS = 32 / LANES;  // keys that a warp reads in one access
constexpr int TURN = AT_ONCE * GROUPS < CHUNK ? AT_ONCE * GROUPS : CHUNK;  // keys on their way
constexpr int KEYS = TURN / GROUPS;                                        // of them in a lane
constexpr int COLUMNS = HEADS * HEAD_DIM;                                  // of a block's output
constexpr int OWN = (COLUMNS + THREADS - 1) / THREADS;                     // of them a thread's
static_assert(CHUNK == 32, "the slots of a chunk are a warp's");
static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM <= 256 && SPAN % WARPS == 0 && PARTS > 0, "");

typedef Pack<storage_t, PACK_WIDTH> Numbers;

// Of shared memory: what the chunks of a span came to.
struct Chunks {
    float sum[SPAN][COLUMNS];  // of values, each times exp2(score - peak)
    float peak[SPAN][HEADS], total[SPAN][HEADS];
};

// Past L1: nothing of the cache is read twice by a multiprocessor.
__device__ inline Numbers read(const Numbers *from)
{
    Numbers numbers;
    if constexpr (sizeof(Numbers) == 16)
        reinterpret_cast<uint4 &>(numbers) = __ldcg(reinterpret_cast<const uint4 *>(from));
    else if constexpr (sizeof(Numbers) == 8)
        reinterpret_cast<uint2 &>(numbers) = __ldcg(reinterpret_cast<const uint2 *>(from));
    else
        reinterpret_cast<unsigned &>(numbers) = __ldcg(reinterpret_cast<const unsigned *>(from));
    return numbers;
}

// Number i of them, in fewer registers than by to_float() of common.cuh, which wants a half alone.
__device__ inline float number(const Numbers &numbers, int i)
{
#if STORAGE == BF16
    const unsigned pair = reinterpret_cast<const unsigned *>(&numbers)[i / 2];
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
#else
    return to_float(numbers.x[i]);
#endif
}

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Adds to a sum against a peak another one against its own.  Written out, so that every place where
// it stands rounds alike.
__device__ inline void join(
    float &peak, float &total, float &sum, float peak2, float total2, float sum2)
{
    const float top = fmaxf(peak, peak2);
    const float base = top == -infinity() ? 0 : top;  // lanes may have seen no key yet
    const float shrink = exp2_fast(peak - base), shrink2 = exp2_fast(peak2 - base);
    peak = top;
    total = fmaf(total, shrink, __fmul_rn(total2, shrink2));
    sum = fmaf(sum, shrink, __fmul_rn(sum2, shrink2));
}

// Where a row's keys are.
struct Row {
    const storage_t *own;    // the new one of the kv head, in qkv
    const storage_t *cache;  // the kv head's in slot 0
    const int *slots;        // (max_keys,)
    int position;            // of the new one
};

// One warp puts the new key and value into the cache.
__device__ inline void keep(storage_t *cache, const Row &row)
{
    const size_t place = (size_t)row.slots[row.position] * KEY_WIDTH + (row.cache - cache);
    for (int i = threadIdx.x % 32; i < 2 * PACKS; i += 32) {
        const int column = i / PACKS * NUM_KV_HEADS * HEAD_DIM + i % PACKS * PACK_WIDTH;
        *reinterpret_cast<Numbers *>(cache + place + column) =
            read(reinterpret_cast<const Numbers *>(row.own + column));
    }
}

// One warp's chunk, from key `first` on.  slot: of key `first + lane`.
__device__ inline void attend(
    Chunks &chunks, int place, const Row &row, const float (&q)[HEADS][NUMBERS], int first,
    int slot)
{
    const int lane = threadIdx.x % 32, group = lane / LANES, unit = lane % LANES;
    float peak[HEADS], total[HEADS] = {}, sum[HEADS][NUMBERS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) peak[h] = -infinity();

#pragma unroll 1
    for (int turn = 0; turn < CHUNK && first + turn <= row.position; turn += TURN) {
        Numbers k[KEYS][SLOTS], v[KEYS][SLOTS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int key = turn + i * GROUPS + group;
            const int at = __shfl_sync(ALL_LANES, slot, key);
            // Behind the new key comes the new key: it is hidden below.
            const bool is_old = first + key < row.position;
            const storage_t *from = is_old ? row.cache + (size_t)at * KEY_WIDTH : row.own;
#pragma unroll
            for (int j = 0; j < SLOTS; j++) {
                // Lanes that have no numbers have others' again, and zeros of q.
                const int column = min((unit + j * LANES) * PACK_WIDTH, HEAD_DIM - PACK_WIDTH);
                k[i][j] = read(reinterpret_cast<const Numbers *>(from + column));
                v[i][j] = read(
                    reinterpret_cast<const Numbers *>(from + NUM_KV_HEADS * HEAD_DIM + column));
            }
        }

        float s[KEYS][HEADS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const bool real = first + turn + i * GROUPS + group <= row.position;
#pragma unroll
            for (int h = 0; h < HEADS; h++) s[i][h] = 0;
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) {
                const float x = number(k[i][j / PACK_WIDTH], j % PACK_WIDTH);
#pragma unroll
                for (int h = 0; h < HEADS; h++) s[i][h] = fmaf(q[h][j], x, s[i][h]);
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
#pragma unroll
                for (int other = LANES / 2; other; other /= 2)
                    s[i][h] += __shfl_xor_sync(ALL_LANES, s[i][h], other);
                if (!real) s[i][h] = -infinity();
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = peak[h];
#pragma unroll
            for (int i = 0; i < KEYS; i++) top = fmaxf(top, s[i][h]);
            const float base = top == -infinity() ? 0 : top;  // a lane may have seen no key yet
            const float shrink = exp2_fast(peak[h] - base);
            peak[h] = top;
            total[h] = __fmul_rn(total[h], shrink);  // as in join(): never part of a fmaf
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) sum[h][j] *= shrink;
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                s[i][h] = exp2_fast(s[i][h] - base);
                total[h] += s[i][h];
            }
        }
#pragma unroll
        for (int i = 0; i < KEYS; i++)
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) {
                const float x = number(v[i][j / PACK_WIDTH], j % PACK_WIDTH);
#pragma unroll
                for (int h = 0; h < HEADS; h++) sum[h][j] = fmaf(s[i][h], x, sum[h][j]);
            }
    }

    // The groups of the warp, each of which saw other keys; the first has the sum of all.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int other = LANES; other < 32; other *= 2) {
            const float peak2 = __shfl_xor_sync(ALL_LANES, peak[h], other);
            const float total2 = __shfl_xor_sync(ALL_LANES, total[h], other);
            const float peak1 = peak[h], total1 = total[h];
#pragma unroll
            for (int j = 0; j < NUMBERS; j++) {
                const float sum2 = __shfl_xor_sync(ALL_LANES, sum[h][j], other);
                peak[h] = peak1, total[h] = total1;
                join(peak[h], total[h], sum[h][j], peak2, total2, sum2);
            }
        }
        if (group > 0) continue;
#pragma unroll
        for (int j = 0; j < NUMBERS; j++) {
            const int column = (unit + j / PACK_WIDTH * LANES) * PACK_WIDTH + j % PACK_WIDTH;
            if (column < HEAD_DIM) chunks.sum[place][h * HEAD_DIM + column] = sum[h][j];
        }
        if (unit == 0) chunks.peak[place][h] = peak[h], chunks.total[place][h] = total[h];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_decode(
    storage_t *__restrict__ out,        // (rows, NUM_HEADS * HEAD_DIM), zeros for idle rows
    storage_t *cache,                   // (slots, KEY_WIDTH): k, then v
    float *sums,                        // (rows, gridDim.x, spans, COLUMNS); none for one split
    float2 *states,                     // (rows, gridDim.x, spans, HEADS): peak and total of sums
    int *tickets,                       // (rows, gridDim.x) 0, and 0 again in the end
    const storage_t *__restrict__ qkv,  // (rows, WIDTH): q, then k, then v
    const int *__restrict__ positions,  // (rows,), -1: idle
    const int *__restrict__ key_table,  // (rows, max_keys) slots
    int max_keys,
    int max_spans,
    float scale)                        // log2(e) / sqrt(HEAD_DIM)
{
    let_next_start();
    extern __shared__ uint4 memory[];
    Chunks &chunks = *reinterpret_cast<Chunks *>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const int head = (kv_head * PARTS + part) * HEADS;
    const size_t number = blockIdx.y;
    Row row;
    row.own = qkv + number * WIDTH + (NUM_HEADS + kv_head) * HEAD_DIM;
    row.cache = cache + kv_head * HEAD_DIM;
    row.slots = key_table + number * max_keys;
    // The first slots are asked for before it is known whether there are so many keys.
    int chunk = blockIdx.z == 0 ? warp : 0;
    int slot = row.slots[min(chunk * CHUNK + lane, max_keys - 1)];
    row.position = positions[number];

    storage_t *to = out + (number * NUM_HEADS + head) * HEAD_DIM;
    if (row.position < 0) {
        if (blockIdx.z == 0)
            for (int i = threadIdx.x; i < COLUMNS; i += THREADS) from_float(to[i], 0);
        return;
    }
    const int all_chunks = row.position / CHUNK + 1;
    const int spans = (all_chunks + SPAN - 1) / SPAN;
    const int split_spans = (spans + gridDim.z - 1) / gridDim.z;  // of each split but the last
    const int splits = (spans + split_spans - 1) / split_spans;   // that have any
    const int first_span = blockIdx.z * split_spans;
    if (first_span >= spans) return;
    const int last_span = min(first_span + split_spans, spans);
    if (first_span > 0) {
        chunk = first_span * SPAN + warp;
        slot = row.slots[min(chunk * CHUNK + lane, max_keys - 1)];
    }

    // The last warp has the fewest keys.
    if (part == 0 && blockIdx.z == 0 && warp == WARPS - 1) keep(cache, row);

    float q[HEADS][NUMBERS];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int j = 0; j < SLOTS; j++) {
            const int column = (lane % LANES + j * LANES) * PACK_WIDTH;
            float x[PACK_WIDTH] = {};
            if (column < HEAD_DIM) load(x, qkv + number * WIDTH + (head + h) * HEAD_DIM + column);
#pragma unroll
            for (int i = 0; i < PACK_WIDTH; i++) q[h][j * PACK_WIDTH + i] = x[i] * scale;
        }

    float peak[OWN], total[OWN] = {}, sum[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) peak[i] = -infinity();
    const size_t block = number * gridDim.x + blockIdx.x;
    for (int span = first_span; span < last_span; span++) {
        const int begin = span * SPAN, end = min(begin + SPAN, all_chunks);
        for (; chunk < end; chunk += WARPS) {
            const int following = (chunk + WARPS) * CHUNK + lane;
            const int next_slot = row.slots[min(following, max_keys - 1)];
            attend(chunks, chunk - begin, row, q, chunk * CHUNK, slot);
            slot = next_slot;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int column = threadIdx.x + i * THREADS, h = column / HEAD_DIM;
            if (column >= COLUMNS) break;
            float span_peak = -infinity(), span_total = 0, span_sum = 0;
            for (int c = 0; c < end - begin; c++)
                join(span_peak, span_total, span_sum, chunks.peak[c][h], chunks.total[c][h],
                     chunks.sum[c][column]);
            if (splits == 1) {
                join(peak[i], total[i], sum[i], span_peak, span_total, span_sum);
                continue;
            }
            const size_t at = block * max_spans + span;
            sums[at * COLUMNS + column] = span_sum;
            if (column % HEAD_DIM == 0) states[at * HEADS + h] = make_float2(span_peak, span_total);
        }
        __syncthreads();  // before the next span's chunks take the place of these
    }

    if (splits > 1) {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(tickets + block, 1) == splits - 1;
            if (is_last) tickets[block] = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int column = threadIdx.x + i * THREADS, h = column / HEAD_DIM;
            if (column >= COLUMNS) break;
#pragma unroll 8
            for (int span = 0; span < spans; span++) {
                const size_t at = block * max_spans + span;
                const float2 state = __ldcg(states + at * HEADS + h);
                join(peak[i], total[i], sum[i], state.x, state.y,
                     __ldcg(sums + at * COLUMNS + column));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int column = threadIdx.x + i * THREADS;
        if (column < COLUMNS) from_float(to[column], sum[i] / total[i]);
    }
}
