// attention on matrix units: out = softmax(q k^T / sqrt(HEAD_DIM)) v, causal, over packed segments
//
// Scores and probabilities live in registers and are never written; softmax is online, in float.
// One block of four warps has 64 queries of one segment and one head; a warp has 16 of them.  The
// grid is (tiles * NUM_HEADS): all heads of the first tile, which sees most keys, go first.  Keys
// come in tiles of KEYS rows, gathered through key_index by cp.async into two stages of shared
// memory, so that the next tile is on its way while this one is used.
//
// A query's bits depend on nothing but its row: tiles start at the row's key 0 and step by KEYS
// wherever the segment starts, and a key it must not see adds exp2(-infinity) = 0 and moves no peak.
//
// With CACHED=1, key_index is of rows of a cache, each keys and then values; else it is of qkv's.
//
// Registers of mma.m16n8k16 (PTX ISA, 9.7.14): with g = lane / 4 and t = lane % 4, of A[16][16] a
// lane holds rows g and g + 8, columns 2t, 2t + 1 and the same + 8; of B[16][8] column g, rows 2t,
// 2t + 1 and the same + 8; of C[16][8] rows g and g + 8, columns 2t, 2t + 1.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int QUERIES = 16 * WARPS;
constexpr int WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;  // of a row of qkv
constexpr int KEY_WIDTH = CACHED ? 2 * NUM_KV_HEADS * HEAD_DIM : WIDTH;
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16;  // HEAD_DIM with zeros up to what mma takes
constexpr int PITCH = 2 * DEPTH + 16;  // bytes; an odd number of 16-byte units: no bank conflicts
constexpr int PART = KEYS * PITCH;     // bytes of a tile's keys, or of its values
constexpr int STAGE = 2 * PART;
constexpr int UNIT = 2 * pack_width(HEAD_DIM);  // bytes a cp.async: 16, 8 or 4
constexpr int UNITS = 2 * HEAD_DIM / UNIT;      // a key
constexpr int WARP_KEYS = KEYS / WARPS;         // keys of a tile that each warp fetches
// Turns of fetch() unrolled.  All of them hold more addresses than there are registers left, where
// the head is large or its units are small and many.
constexpr int UNROLL = UNIT == 16 && HEAD_DIM <= 128 ? WARP_KEYS * UNITS / 32 + 1 : 2;
static_assert(HEAD_DIM % 2 == 0 && KEYS % 16 == 0 && WARP_KEYS <= 32 && 32 % WARP_KEYS == 0, "");

__device__ inline unsigned bits(float a, float b)  // two numbers as mma takes them
{
    Pack<storage_t, 2> pair;
    from_float(pair.x[0], a);
    from_float(pair.x[1], b);
    return reinterpret_cast<const unsigned &>(pair);
}

__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
#if STORAGE == FP16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices, lane i pointing at row i % 8 of matrix i / 8.
__device__ inline void ldmatrix(unsigned (&r)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ inline void ldmatrix_transposed(unsigned (&r)[4], unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// UNIT bytes from global to shared memory, or that many zeros.
__device__ inline void copy_async(unsigned to, const void *from, bool real)
{
    const int bytes = real ? UNIT : 0;
    if constexpr (UNIT == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(to), "l"(from), "n"(UNIT), "r"(bytes) : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

__device__ inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Fetch this warp's part of a tile; `place` is the row of the key `lane % WARP_KEYS` of it.
__device__ inline void fetch(unsigned stage, const storage_t *k, int place, int keys_left)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll UNROLL
    for (int first = 0; first < WARP_KEYS * UNITS; first += 32) {
        const int key = (first + lane) / UNITS, unit = (first + lane) % UNITS;
        const int at = __shfl_sync(ALL_LANES, place, key);
        const char *from = reinterpret_cast<const char *>(k + (size_t)at * KEY_WIDTH) + unit * UNIT;
        const unsigned to = stage + (warp * WARP_KEYS + key) * PITCH + unit * UNIT;
        const bool real = warp * WARP_KEYS + key < keys_left;
        if (key < WARP_KEYS) {
            copy_async(to, from, real);
            copy_async(to + PART, from + 2 * NUM_KV_HEADS * HEAD_DIM, real);
        }
    }
}

// Row of this lane's key of the tile that starts at `first`; any row past the end.
__device__ inline int place_of_key(const int *key_index, int first, int keys)
{
    const int key = first + threadIdx.x / 32 * WARP_KEYS + threadIdx.x % WARP_KEYS;
    return key_index[key < keys ? key : 0];
}

// Columns from HEAD_DIM on of both stages: mma multiplies them, so they must not hold NaN.
__device__ inline void clear_padding(unsigned shared)
{
    constexpr int WORDS = (PITCH - 2 * HEAD_DIM) / 4;
    for (int i = threadIdx.x; i < 4 * KEYS * WORDS; i += THREADS) {
        const unsigned at = shared + i / WORDS * PITCH + 2 * HEAD_DIM + i % WORDS * 4;
        asm volatile("st.shared.u32 [%0], %1;" :: "r"(at), "r"(0) : "memory");
    }
}

// The warp's queries as A: rows past `queries` and columns past HEAD_DIM are zero.
__device__ inline void load_queries(
    unsigned (&q)[DEPTH / 16][4], const storage_t *from, int queries)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = g + i % 2 * 8, column = 16 * step + 2 * t + i / 2 * 8;
            const bool real = row < queries && column < HEAD_DIM;
            q[step][i] = real ? *reinterpret_cast<const unsigned *>(
                                    from + (size_t)row * WIDTH + column)
                              : 0;
        }
    }
}

// s = q k^T for 16 queries and the KEYS keys at `keys` in shared memory.
__device__ inline void multiply_keys(
    float (&s)[KEYS / 8][4], const unsigned (&q)[DEPTH / 16][4], unsigned keys)
{
    const int lane = threadIdx.x % 32;
    const unsigned at = keys + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        for (int i = 0; i < 4; i++) s[n][i] = 0;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            unsigned b[4];
            ldmatrix(b, at + n * 8 * PITCH + step * 32);
            mma(s[n], q[step], b[0], b[1]);
            mma(s[n + 1], q[step], b[2], b[3]);
        }
    }
}

// o += p v for 16 queries and the KEYS values at `values` in shared memory.
__device__ inline void multiply_values(
    float (&o)[DEPTH / 8][4], const float (&p)[KEYS / 8][4], unsigned values)
{
    const int lane = threadIdx.x % 32;
    const unsigned at = values + lane % 16 * PITCH + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        const float *left = p[2 * step], *right = p[2 * step + 1];
        const unsigned a[4] = {bits(left[0], left[1]), bits(left[2], left[3]),
                               bits(right[0], right[1]), bits(right[2], right[3])};
#pragma unroll
        for (int n = 0; n < DEPTH / 8; n += 2) {
            unsigned b[4];
            ldmatrix_transposed(b, at + step * 16 * PITCH + n * 16);
            mma(o[n], a, b[0], b[1]);
            mma(o[n + 1], a, b[2], b[3]);
        }
    }
}

// Scores to probabilities against the peak so far; what was summed before shrinks with the old peak.
// half 0 is query g of the warp, half 1 query g + 8.
__device__ inline void soften(
    float (&s)[KEYS / 8][4], float (&o)[DEPTH / 8][4], float (&peak)[2], float (&total)[2],
    float scale)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = peak[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        const float shrink = exp2_fast((peak[half] - top) * scale);
        const float offset = -top * scale;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = exp2_fast(fmaf(s[n][i], scale, offset));
                sum += s[n][i];
            }
        }
        peak[half] = top;
        total[half] = total[half] * shrink + sum;
#pragma unroll
        for (int n = 0; n < DEPTH / 8; n++) {
            o[n][2 * half] *= shrink;
            o[n][2 * half + 1] *= shrink;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, DEPTH <= 64 ? 3 : 2) attention_mma(
    storage_t *__restrict__ out,            // (tokens, NUM_HEADS * HEAD_DIM)
    const storage_t *__restrict__ qkv,      // (tokens, WIDTH): q, then k, then v
    const int2 *__restrict__ tiles,         // (tiles,) segment, first query of the tile in it
    const int *__restrict__ segment_start,  // (segments + 1,)
    const int *__restrict__ key_start,      // (segments + 1,)
    const int *__restrict__ key_index,      // (keys,)
    float scale,                            // log2(e) / sqrt(HEAD_DIM)
    const storage_t *__restrict__ cache)    // (slots, KEY_WIDTH): k, then v; unused if not CACHED
{
    extern __shared__ uint4 memory[];
    const unsigned shared = __cvta_generic_to_shared(memory);
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int head = blockIdx.x % NUM_HEADS;
    const int2 tile = tiles[blockIdx.x / NUM_HEADS];
    const int first_token = segment_start[tile.x];
    const int queries = segment_start[tile.x + 1] - first_token;
    const int own_keys = key_start[tile.x];
    const int past = key_start[tile.x + 1] - own_keys - queries;  // keys before the segment
    const int last_query = min(tile.y + QUERIES, queries) - 1;
    const int keys = past + last_query + 1;  // what the block's last query sees
    const int warp_query = tile.y + 16 * warp;
    const int warp_queries = last_query + 1 - warp_query;  // 16, fewer, or none
    const int warp_keys = past + min(warp_query + 16, queries);
    const int kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
    const storage_t *k =
        CACHED ? cache + kv_head * HEAD_DIM : qkv + (NUM_HEADS + kv_head) * HEAD_DIM;
    key_index += own_keys;

    int place = place_of_key(key_index, 0, keys);
    fetch(shared, k, place, keys);
    commit();
    place = place_of_key(key_index, KEYS, keys);
    if (DEPTH > HEAD_DIM) clear_padding(shared);

    unsigned q[DEPTH / 16][4];
    const size_t row = first_token + warp_query;
    load_queries(q, qkv + row * WIDTH + head * HEAD_DIM, warp_queries);

    float o[DEPTH / 8][4] = {};
    float peak[2] = {-infinity(), -infinity()}, total[2] = {};
    unsigned stage = shared;
    for (int first = 0; first < keys; first += KEYS) {
        const unsigned other = 2 * shared + STAGE - stage;
        if (first + KEYS < keys) {
            fetch(other, k, place, keys - first - KEYS);
            place = place_of_key(key_index, first + 2 * KEYS, keys);
        }
        commit();
        wait<1>();
        __syncthreads();
        if (warp_queries > 0 && first < warp_keys) {
            float s[KEYS / 8][4];
            multiply_keys(s, q, stage);
            // Key 0 is seen by every query, so from the first tile on no peak is -infinity.
            if (first + KEYS > past + warp_query + 1) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int key = first + 8 * n + 2 * t + i % 2;
                        if (key > past + warp_query + g + i / 2 * 8) s[n][i] = -infinity();
                    }
                }
            }
            soften(s, o, peak, total, scale);
            multiply_values(o, s, stage + PART);
        }
        __syncthreads();
        stage = other;
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
        total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
        if (g + 8 * half >= warp_queries) continue;
        storage_t *to = out + ((row + g + 8 * half) * NUM_HEADS + head) * HEAD_DIM;
        const float inverse = 1 / total[half];
#pragma unroll
        for (int n = 0; n < DEPTH / 8; n++) {
            const int column = 8 * n + 2 * t;
            if (column < HEAD_DIM)
                *reinterpret_cast<unsigned *>(to + column) =
                    bits(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
        }
    }
}
