// few_rows: y = x w^T and what follows it, for int8 w and so few rows of x that reading w is the work
//
// A tile is ROWS rows of w by all rows of x, TOKENS at most, and takes k by stages.  All stages of all tiles stand
// in one line, and each block has an equal piece of it: no multiprocessor reads more than another.  A
// tile that several blocks have pieces of is finished by the last of them to arrive, which adds the
// pieces in the order of k: no bit depends on who is last.
//
// A warp has 16 * TILES of the rows of w, 8 * COLUMNS of the tokens and one of K_WARPS parts of a
// stage.  Both operands come by cp.async through a ring of STAGES stages.  mma may take k in any
// order, if it is one for both: a lane's 16 bytes of a row of w feed it as they lie in memory, and its
// 16 bytes of x likewise.  A lane so reads what it copied itself of w; only x is shared, by the warps
// of one part of k.
//
// Rows g and g + 8 of a warp's A, as product.cuh has them, are a pair of rows of w.
#define PLAIN_APART 8
#define INT8 1
#include "product.cuh"

constexpr int GROUP_WARPS = ROW_WARPS * TOKEN_WARPS;  // which have one part of k in common
constexpr int THREADS = 32 * GROUP_WARPS * K_WARPS;
constexpr int TILES = ROWS / (16 * ROW_WARPS);
constexpr int COLUMNS = TOKENS / (8 * TOKEN_WARPS);
constexpr int PAIRS = ROWS / 2;
constexpr int PART = CHUNKS * 64;      // k of a stage, for one warp
constexpr int STAGE = K_WARPS * PART;  // and for all of them
constexpr int W_PART = CHUNKS * ROW_WARPS * TILES * 64;  // units of 16 bytes
constexpr int X_PART = CHUNKS * TOKENS * 8;
constexpr int RING = STAGES * K_WARPS * (W_PART + X_PART);
constexpr int PITCH = ROWS + 4;  // floats; a warp's sums then go to 32 banks
static_assert(ROWS % (16 * ROW_WARPS) == 0 && TOKENS % (8 * TOKEN_WARPS) == 0, "");
static_assert(CHUNKS % TOKEN_WARPS == 0 && K_WARPS % SUM_PARTS == 0, "");

struct Sizes : Rows {
    int k;
    int stages;  // of a tile
};

// The warps of one part of k wait for each other.
__device__ inline void sync_group(int part)
{
    if (GROUP_WARPS == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" :: "r"(part + 1), "n"(32 * GROUP_WARPS) : "memory");
}

// What a thread fetches: a stage of a tile, for its warp's part of k.
struct Source {
    int tile, stage;
    const char *row[TILES][2];  // of w, from this lane's first 16 bytes on

    __device__ inline void find_rows(const char *w, const Sizes &sizes)
    {
        const int warp = threadIdx.x / 32 % GROUP_WARPS / TOKEN_WARPS, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int pair = tile * PAIRS + (warp * TILES + i) * 8 + lane / 4;
            const int low = sizes.low(min(pair, sizes.pairs - 1));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Past the end any row will do: its sums are not stored.
                const size_t at = min(low + half * sizes.apart, sizes.n - 1);
                row[i][half] = w + at * sizes.k + lane % 4 * 16;
            }
        }
    }

    __device__ inline void advance(const char *w, const Sizes &sizes)
    {
        if (++stage < sizes.stages) return;
        stage = 0;
        tile++;
        find_rows(w, sizes);
    }
};

// Where in k this warp's part of a stage begins.
__device__ inline int part_begin(int stage)
{
    return stage * STAGE + threadIdx.x / 32 / GROUP_WARPS * PART;
}

__device__ inline void fetch_w(uint4 *w_part, const Source &source, const Sizes &sizes)
{
    const int warp = threadIdx.x / 32 % GROUP_WARPS, lane = threadIdx.x % 32;
    const int first = part_begin(source.stage);
#pragma unroll
    for (int j = 0; j < CHUNKS / TOKEN_WARPS; j++) {
        const int chunk = j * TOKEN_WARPS + warp % TOKEN_WARPS;
        const int at = first + chunk * 64;
        const bool real = at + lane % 4 * 16 < sizes.k;
        uint4 *to = w_part + ((chunk * ROW_WARPS + warp / TOKEN_WARPS) * TILES * 2) * 32 + lane;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const char *from = source.row[i / 2][i % 2];
            copy_async(to + 32 * i, real ? from + at : from, real);
        }
    }
}

__device__ inline void fetch_x(
    uint4 *x_part, const storage_t *x, int stage, int tokens, const Sizes &sizes)
{
    const int first = part_begin(stage);
#pragma unroll
    for (int j = 0; j < X_PART; j += 32 * GROUP_WARPS) {
        const int i = j + threadIdx.x % (32 * GROUP_WARPS);
        if (X_PART % (32 * GROUP_WARPS) && i >= X_PART) break;
        const int token = i / 8 % TOKENS, at = first + i / (8 * TOKENS) * 64 + i % 8 * 8;
        const bool real = token < tokens && at < sizes.k;
        // Of two units that one lane reads in turn, the first comes second in every other row: eight
        // lanes then read from all banks.
        copy_async(x_part + (i ^ (token & 1)), real ? x + (size_t)token * sizes.k + at : x, real);
    }
}

__device__ inline void multiply(
    float (&sum)[TILES][COLUMNS][4], const uint4 *w_part, const uint4 *x_part)
{
    const int warp = threadIdx.x / 32 % GROUP_WARPS, lane = threadIdx.x % 32;
    const int token = warp % TOKEN_WARPS * (8 * COLUMNS) + lane / 4, t = lane % 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        uint4 w[TILES][2];
        const uint4 *from =
            w_part + ((chunk * ROW_WARPS + warp / TOKEN_WARPS) * TILES * 2) * 32 + lane;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) w[i / 2][i % 2] = from[32 * i];
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {  // 16 bytes of x, for 8 of w
            unsigned a[TILES][2][4];  // of each half of w: four words, two for each of two mma
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                const uint4 &bits = w[i / 2][i % 2];
                unsigned(&to)[4] = a[i / 2][i % 2];
                widen(to[0], to[1], unit ? bits.z : bits.x);
                widen(to[2], to[3], unit ? bits.w : bits.y);
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const int place = (chunk * TOKENS + token + 8 * j) * 8 + t * 2;
                const uint4 b = x_part[place + (unit ^ (token & 1))];
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const unsigned(&low)[4] = a[i][0], (&high)[4] = a[i][1];
                    mma(sum[i][j], low[0], high[0], low[1], high[1], b.x, b.y);
                    mma(sum[i][j], low[2], high[2], low[3], high[3], b.z, b.w);
                }
            }
        }
    }
}

// To shared memory, (SUM_PARTS, TOKENS, PITCH): what does not fit beside the others is added to one
// of them, in turn.  The sums are zero again after it.
__device__ inline void put_sums(float *sums, float (&sum)[TILES][COLUMNS][4])
{
    const int warp = threadIdx.x / 32 % GROUP_WARPS, part = threadIdx.x / 32 / GROUP_WARPS;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_token = warp % TOKEN_WARPS * (8 * COLUMNS) + 2 * t;
    float *at = sums + (part % SUM_PARTS * TOKENS + first_token) * PITCH +
                warp / TOKEN_WARPS * (16 * TILES) + g;
#pragma unroll
    for (int turn = 0; turn < K_WARPS / SUM_PARTS; turn++) {
        if (part / SUM_PARTS == turn)
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        float &to = at[(8 * j + c % 2) * PITCH + 16 * i + c / 2 * 8];
                        to = turn ? to + sum[i][j][c] : sum[i][j][c];
                        sum[i][j][c] = 0;
                    }
        __syncthreads();
    }
}

__device__ inline float2 get_sums(const float *sums, int token, int pair)
{
    const float *at = sums + token * PITCH + pair / 8 * 16 + pair % 8;
    float2 both = {at[0], at[8]};
#pragma unroll
    for (int part = 1; part < SUM_PARTS; part++) {
        both.x += at[part * TOKENS * PITCH];
        both.y += at[part * TOKENS * PITCH + 8];
    }
    return both;
}

// Of one token and one pair of rows of w: everything that follows the sum.
__device__ inline void finish(
    out_t *y, float2 sum, int token, int pair, const After &after, const Sizes &sizes)
{
    Beside beside;
    beside.read(y, token, pair, after, sizes);
    finish(y, sum, token, pair, beside, after, sizes);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) few_rows(
    out_t *y,                               // (m, n), or (m, n / 2) with SWIGLU
    const storage_t *__restrict__ x,        // (m, k)
    const char *__restrict__ w,             // (n, k), k a multiple of 16
    const float *__restrict__ scale,        // (n,)
    const storage_t *__restrict__ bias,     // (n,) or null
    const int *__restrict__ positions,      // (m,) with ROPE
    const float *__restrict__ cos,          // (positions, apart) with ROPE
    const float *__restrict__ sin,          // (positions, apart) with ROPE
    float2 *parts,                          // (blocks, 2, TOKENS, PAIRS): of a first, of a last tile
    int *arrived,                           // (blocks,), zero before and after
    int m, int n, int k, int apart, int rotated, int accumulate)
{
    extern __shared__ uint4 ring[];
    float *sums = reinterpret_cast<float *>(ring + RING);
    __shared__ int is_last;

    const int pairs = EPILOGUE == PLAIN || EPILOGUE == RELU ? (n + 15) / 16 * 8 : n / 2;
    const Sizes sizes = {{n, pairs, apart}, k, (k + STAGE - 1) / STAGE};
    const Line line = {(long long)((pairs + PAIRS - 1) / PAIRS) * sizes.stages, (int)gridDim.x};
    const int block = blockIdx.x, first = line.begin(block), last = line.begin(block + 1);
    const After after = {scale, bias, positions, cos, sin, rotated, accumulate};
    const int part = threadIdx.x / 32 / GROUP_WARPS;
    uint4 *const w_ring = ring + part * W_PART;
    uint4 *const x_ring = ring + STAGES * K_WARPS * W_PART + part * X_PART;

    Source source = {first / sizes.stages, first % sizes.stages};
    source.find_rows(w, sizes);
    int slot = 0, ahead = STAGES - 1;
    let_next_start();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (first + i < last) {
            fetch_w(w_ring + i * K_WARPS * W_PART, source, sizes);
            source.advance(w, sizes);
        }
    // All but w may be what a kernel writes that is still at work.
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (first + i < last)
            fetch_x(x_ring + i * K_WARPS * X_PART, x, (first + i) % sizes.stages, m, sizes);
        commit();
    }

    float sum[TILES][COLUMNS][4] = {};
    int tile = first / sizes.stages, left = sizes.stages - first % sizes.stages;
    for (int item = first; item < last; item++) {
        wait<STAGES - 2>();
        sync_group(part);
        if (item + STAGES - 1 < last) {
            fetch_w(w_ring + ahead * K_WARPS * W_PART, source, sizes);
            fetch_x(x_ring + ahead * K_WARPS * X_PART, x, source.stage, m, sizes);
            source.advance(w, sizes);
        }
        commit();
        multiply(sum, w_ring + slot * K_WARPS * W_PART, x_ring + slot * K_WARPS * X_PART);
        slot = slot == STAGES - 1 ? 0 : slot + 1;
        ahead = ahead == STAGES - 1 ? 0 : ahead + 1;
        if (--left && item + 1 < last) continue;

        put_sums(sums, sum);
        const int tile_first = tile * sizes.stages;
        const int from = line.block_of(tile_first);
        const int to = line.block_of(tile_first + sizes.stages - 1);
        // Of a block's two places in `parts` the first is for a tile that others began.
        float2 *own = parts + ((size_t)block * 2 + (block == from)) * (TOKENS * PAIRS);
        const bool whole = from == to;
        for (int i = threadIdx.x; i < m * PAIRS; i += THREADS) {
            const int pair = tile * PAIRS + i % PAIRS;
            const float2 both = get_sums(sums, i / PAIRS, i % PAIRS);
            if (!whole)
                __stcg(own + i, both);
            else if (pair < pairs)
                finish(y, both, i / PAIRS, pair, after, sizes);
        }
        if (!whole) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) is_last = atomicAdd(arrived + from, 1) == to - from;
            __syncthreads();
            if (is_last) {
                __threadfence();
                if (threadIdx.x == 0) arrived[from] = 0;
                for (int i = threadIdx.x; i < m * PAIRS; i += THREADS) {
                    const int pair = tile * PAIRS + i % PAIRS;
                    float2 both = {0, 0};
                    for (int other = from; other <= to; other++) {
                        const size_t at = (size_t)other * 2 + (other == from);
                        const float2 piece = __ldcg(parts + at * (TOKENS * PAIRS) + i);
                        both.x += piece.x;
                        both.y += piece.y;
                    }
                    if (pair < pairs) finish(y, both, i / PAIRS, pair, after, sizes);
                }
            }
        }
        __syncthreads();  // before the sums are written again
        tile++;
        left = sizes.stages;
    }
}
