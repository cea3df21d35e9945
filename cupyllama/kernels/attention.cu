// attention on any GPU and storage: out = softmax(q k^T / sqrt(HEAD_DIM)) v, causal, packed segments
//
// Scores are never written to global memory; softmax is online.  A tile of 64 queries of one segment
// is spread over gridDim.y blocks of four warps; a warp has WARP_QUERIES queries.  The grid is
// (tiles * NUM_HEADS, parts of a tile), heads fastest.  Keys come in tiles of 32 through shared
// memory, as float, then their values in the same place: a lane has one key of the tile while scores
// are made, and every 32nd column of the head while values are mixed.
//
// A query's bits depend on nothing but its row: tiles start at the row's key 0 and step by 32
// wherever the segment starts, and a key it must not see adds exp2(-infinity) = 0 and moves no peak.
//
// With CACHED=1, key_index is of rows of a cache, each keys and then values; else it is of qkv's.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int KEYS = 32;
constexpr int QUERIES = WARPS * WARP_QUERIES;
constexpr int WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;  // of a row of qkv
constexpr int KEY_WIDTH = CACHED ? 2 * NUM_KV_HEADS * HEAD_DIM : WIDTH;
constexpr int COLUMNS = (HEAD_DIM + 31) / 32;                     // a lane
constexpr int PITCH = 32 * COLUMNS + 4;  // an odd number of float4: lanes hit different banks
constexpr int PACK = pack_width(HEAD_DIM);
constexpr int PACKS = HEAD_DIM / PACK;

// Row `i` of `n` from `from(i)`, as float; zeros behind HEAD_DIM and for the rows past `real`.
template <typename From>
__device__ inline void fill(float (*to)[PITCH], int n, int real, From from)
{
    for (int i = threadIdx.x; i < n * PACKS; i += THREADS) {
        const int row = i / PACKS, column = i % PACKS * PACK;
        float x[PACK] = {};
        if (row < real) load(x, from(row) + column);
#pragma unroll
        for (int j = 0; j < PACK; j++) to[row][column + j] = x[j];
    }
    constexpr int PADDING = PITCH - HEAD_DIM;
    for (int i = threadIdx.x; i < n * PADDING; i += THREADS)
        to[i / PADDING][HEAD_DIM + i % PADDING] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention(
    storage_t *__restrict__ out,            // (tokens, NUM_HEADS * HEAD_DIM)
    const storage_t *__restrict__ qkv,      // (tokens, WIDTH): q, then k, then v
    const int2 *__restrict__ tiles,         // (tiles,) segment, first of up to 64 queries in it
    const int *__restrict__ segment_start,  // (segments + 1,)
    const int *__restrict__ key_start,      // (segments + 1,)
    const int *__restrict__ key_index,      // (keys,)
    float scale,                            // log2(e) / sqrt(HEAD_DIM)
    const storage_t *__restrict__ cache)    // (slots, KEY_WIDTH): k, then v; unused if not CACHED
{
    alignas(16) __shared__ float q[QUERIES][PITCH];
    alignas(16) __shared__ float kv[KEYS][PITCH];
    alignas(16) __shared__ float p[QUERIES][KEYS];

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % NUM_HEADS;
    const int2 tile = tiles[blockIdx.x / NUM_HEADS];
    const int first_token = segment_start[tile.x];
    const int queries = segment_start[tile.x + 1] - first_token;
    const int first_query = tile.y + blockIdx.y * QUERIES;
    if (first_query >= queries) return;
    const int own_keys = key_start[tile.x];
    const int past = key_start[tile.x + 1] - own_keys - queries;  // keys before the segment
    const int block_queries = min(queries - first_query, QUERIES);
    const int keys = past + first_query + block_queries;  // what the block's last query sees
    const int warp_query = warp * WARP_QUERIES;           // in the block
    const size_t first_row = first_token + first_query;
    const int kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
    const storage_t *k =
        CACHED ? cache + kv_head * HEAD_DIM : qkv + (NUM_HEADS + kv_head) * HEAD_DIM;
    const storage_t *v = k + NUM_KV_HEADS * HEAD_DIM;
    key_index += own_keys;

    fill(q, QUERIES, block_queries,
         [&](int i) { return qkv + (first_row + i) * WIDTH + head * HEAD_DIM; });
    float o[WARP_QUERIES][COLUMNS] = {};
    float peak[WARP_QUERIES], total[WARP_QUERIES] = {};
#pragma unroll
    for (int i = 0; i < WARP_QUERIES; i++) peak[i] = -infinity();

    for (int first = 0; first < keys; first += KEYS) {
        __syncthreads();  // the values of the tile before are used up
        fill(kv, KEYS, keys - first,
             [&](int i) { return k + (size_t)key_index[first + i] * KEY_WIDTH; });
        __syncthreads();

        float s[WARP_QUERIES] = {};
#pragma unroll 4
        for (int column = 0; column < 32 * COLUMNS; column += 4) {
            const float4 b = *reinterpret_cast<const float4 *>(&kv[lane][column]);
#pragma unroll
            for (int i = 0; i < WARP_QUERIES; i++) {
                const float4 a = *reinterpret_cast<const float4 *>(&q[warp_query + i][column]);
                s[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
#pragma unroll
        for (int i = 0; i < WARP_QUERIES; i++) {
            // Key 0 is seen by every query, so from the first tile on no peak is -infinity.
            if (first + lane > past + first_query + warp_query + i) s[i] = -infinity();
            const float top = fmaxf(peak[i], warp_max(s[i]));
            const float shrink = exp2f((peak[i] - top) * scale);
            s[i] = exp2f(fmaf(s[i], scale, -top * scale));
            total[i] = total[i] * shrink + s[i];
            peak[i] = top;
            p[warp_query + i][lane] = s[i];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) o[i][j] *= shrink;
        }
        __syncthreads();  // the keys are used up
        fill(kv, KEYS, keys - first,
             [&](int i) { return v + (size_t)key_index[first + i] * KEY_WIDTH; });
        __syncthreads();

        for (int key = 0; key < KEYS; key += 4) {
            float b[4][COLUMNS];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) b[i][j] = kv[key + i][lane + 32 * j];
#pragma unroll
            for (int i = 0; i < WARP_QUERIES; i++) {
                const float4 a = *reinterpret_cast<const float4 *>(&p[warp_query + i][key]);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
                    o[i][j] += a.x * b[0][j] + a.y * b[1][j] + a.z * b[2][j] + a.w * b[3][j];
            }
        }
    }

#pragma unroll
    for (int i = 0; i < WARP_QUERIES; i++) {
        const float sum = warp_sum(total[i]);
        if (warp_query + i >= block_queries) break;
        storage_t *to = out + ((first_row + warp_query + i) * NUM_HEADS + head) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            if (lane + 32 * j < HEAD_DIM) from_float(to[lane + 32 * j], o[i][j] / sum);
    }
}
