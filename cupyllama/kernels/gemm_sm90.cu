// gemm_sm90: y = x w^T and what follows it, for compute capability 9.0
//
// EPILOGUE says what follows, on float sums that are rounded once.  SWIGLU: w is gate above up, and
// y = silu(x gate^T) * (x up^T); gate and up are never written.  ROPE: w is q above k above v, and
// the heads of the first `rotated` columns turn by their row's position.  x and w are STORAGE, or
// with FP8 e4m3, whose products are first multiplied by their row's and their column's scale.
//
// One block a multiprocessor takes tiles of TILE_M x TILE_N in turn.  Warpgroup 0 fetches: one
// thread has the copy engine fill a ring of STAGES stages, 128 swizzled bytes of k each.
// Warpgroups 1 and 2 multiply 64 rows each and go on to the epilogue while the ring fills for the
// next tile.  The two blocks of a cluster have tiles one below the other: each fetches half of the
// rows of w that both need and multicasts it.
//
// A row's bits depend on nothing but the row and w: every tile sums k in one order.
//
// Registers: sum[4 * j + i] is row 16 * w + g + i / 2 * 8, column 8 * j + 2 * t + i % 2, with
// w = warp % 4 and g and t as in hopper.cuh.
#include "hopper.cuh"

#define SWIGLU 1
#define ROPE 2

constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int OUT_N = EPILOGUE == SWIGLU ? TILE_N / 2 : TILE_N;  // columns of y of a tile
constexpr int SUMS = TILE_N / 2;                                 // registers of 64 rows
constexpr int PITCH = 128;         // bytes of k of a stage: a row of the swizzle
constexpr int STEPS = PITCH / 32;  // wgmma that a stage feeds: each takes 32 bytes of k
constexpr int X_BYTES = TILE_M * PITCH;
constexpr int W_BYTES = TILE_N * PITCH;
constexpr int FULL = STAGES * (X_BYTES + W_BYTES);  // where the barriers lie in shared memory
constexpr int EMPTY = FULL + 8 * STAGES;
static_assert(TILE_M == 64 * CONSUMERS && TILE_N == 256 && CLUSTER == 2, "");

struct Tile {
    int row, column;  // of y
};

__device__ inline int tiles_down(int m) { return (m + TILE_M * CLUSTER - 1) / (TILE_M * CLUSTER); }
__device__ inline int tiles_across(int n) { return (n + OUT_N - 1) / OUT_N; }

// Where the tile of a cluster's block `rank` lies.  GROUP clusters down m, then the next column, so
// that those at work at one time share most of what they read; back again in the next group, beside
// what is still in L2.
__device__ inline Tile tile_at(int index, int m, int n, int rank)
{
    const int across = tiles_across(n);
    const int group = index / (GROUP * across), inside = index % (GROUP * across);
    const int first = group * GROUP, rows = min(GROUP, tiles_down(m) - first);
    const int column = group % 2 ? across - 1 - inside / rows : inside / rows;
    return {((first + inside % rows) * CLUSTER + rank) * TILE_M, column * OUT_N};
}

// What one thread of warpgroup 0 does.  Either block awaits a whole stage, whoever fetches it; what
// the other fetches may come before expect_tx: the phase still lacks the arrival.
__device__ inline void produce(
    unsigned shared, const TensorMap &x, const TensorMap &w, int m, int n, int blocks, int rank)
{
    const int tiles = tiles_down(m) * tiles_across(n);
    Ring<STAGES> ring;
    for (int i = blockIdx.x / CLUSTER; i < tiles; i += gridDim.x / CLUSTER) {
        const Tile tile = tile_at(i, m, n, rank);
        // With SWIGLU one block fetches gate, the other up.  Past its end gate runs into up, and up
        // into zeros: columns that nobody stores.
        const int w_row = tile.column + rank * (EPILOGUE == SWIGLU ? n : TILE_N / CLUSTER);
        for (int block = 0; block < blocks; block++, ring.next()) {
            const unsigned full = shared + FULL + 8 * ring.at;
            const unsigned x_at = shared + ring.at * X_BYTES;
            const unsigned w_at = shared + STAGES * X_BYTES + ring.at * W_BYTES;
            // Of a fresh barrier the phase before the first counts as complete.
            wait(shared + EMPTY + 8 * ring.at, ring.parity ^ 1);
            arrive_expecting(full, X_BYTES + W_BYTES);
            copy_box(x_at, x, tile.row, block * PITCH, full);
            copy_box_to_all(
                w_at + rank * (W_BYTES / CLUSTER), w, w_row, block * PITCH, full, CLUSTER);
        }
    }
}

// An address of this block, without which block of the cluster it is.
__device__ inline unsigned here(unsigned address) { return address & 0x3ffff; }

// This warp is done with a stage: `empty` are the barriers of the block to which this lane brings
// the news, for either writes into the stages of both.
__device__ inline void release_stage(unsigned empty, int stage)
{
    if (threadIdx.x % 32 < CLUSTER) arrive_in_block(empty + 8 * stage);
}

// Begin the sums of a tile, for this warpgroup's rows; they are there after drain().
__device__ inline void multiply_tile(
    float (&sum)[SUMS], Ring<STAGES> &ring, unsigned shared, unsigned empty, int consumer,
    int blocks)
{
    for (int block = 0; block < blocks; block++) {
        const auto x = rows_at(here(shared + ring.at * X_BYTES + consumer * 64 * PITCH));
        const auto w = rows_at(here(shared + STAGES * X_BYTES + ring.at * W_BYTES));
        wait(shared + FULL + 8 * ring.at, ring.parity);
        begin();
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            multiply(sum, x + step * 32 / 16, w + step * 32 / 16, step || block);
        commit();
        // All but what was just begun: the stage before is free.
        finish<1>();
        if (block) release_stage(empty, ring.before());
        ring.next();
    }
}

__device__ inline void drain(float (&sum)[SUMS], const Ring<STAGES> &ring, unsigned empty)
{
    finish<0>();
    release_stage(empty, ring.before());
    pin(sum);
}

// The two rows of y, g and g + 8 of a warp's 16, that a lane has numbers of.
struct Rows {
    int at[2];
    bool real[2];

    __device__ inline Rows(int first, int m)
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
            real[half] = row < m;
            at[half] = min(row, m - 1);  // for what is read of it
        }
    }
};

// e4m3: multiply sums by their row's and their column's scale.
__device__ inline void scale(
    float (&sum)[SUMS], const Rows &rows, const float *__restrict__ row_scale,
    const float *__restrict__ column_scale, int column, int n)
{
    const float by_row[2] = {row_scale[rows.at[0]], row_scale[rows.at[1]]};
#pragma unroll
    for (int group = 0; group < TILE_N / 32; group++) {
        // n is a multiple of 32: what begins past the end is not stored, and any scale will do.
        const float *by = column_scale + min(column + group * 32 % OUT_N, n - 32) +
                          group * 32 / OUT_N * n + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 by_column = *reinterpret_cast<const float2 *>(by + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[16 * group + 4 * j + i] *= i % 2 ? by_column.y : by_column.x;
#pragma unroll
            for (int i = 0; i < 4; i++) sum[16 * group + 4 * j + i] *= by_row[i / 2];
        }
    }
}

#if EPILOGUE == ROPE
constexpr int HALF = HEAD_DIM / 2;
constexpr int PAIRS = HALF / 8;  // float2 of a table's row for a lane; the same for all heads
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "a tile has whole heads, a lane both of a pair");

struct Turn {
    float2 cos[2][PAIRS], sin[2][PAIRS];
};

__device__ inline void load_turn(
    Turn &turn, const float *__restrict__ cos, const float *__restrict__ sin,
    const int (&position)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const size_t at = (size_t)position[half] * HALF + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            turn.cos[half][j] = *reinterpret_cast<const float2 *>(cos + at + 8 * j);
            turn.sin[half][j] = *reinterpret_cast<const float2 *>(sin + at + 8 * j);
        }
    }
}

// Rotate the heads that begin before `columns`.  One way to contract, whatever the compiler would
// choose for each row: bits may not depend on it.
__device__ inline void rotate(float (&sum)[SUMS], const Turn &turn, int columns)
{
#pragma unroll
    for (int head = 0; head < TILE_N; head += HEAD_DIM) {
        if (head >= columns) break;
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) {
            float &low = sum[head / 2 + i], &high = sum[head / 2 + HALF / 2 + i];
            const float2 c = turn.cos[i % 4 / 2][i / 4], s = turn.sin[i % 4 / 2][i / 4];
            const float cos = i % 2 ? c.y : c.x, sin = i % 2 ? s.y : s.x;
            const float turned = __fmaf_rn(low, cos, -__fmul_rn(high, sin));
            high = __fmaf_rn(high, cos, __fmul_rn(low, sin));
            low = turned;
        }
    }
}
#endif

// Round and write 64 rows of a tile: a lane has 16 bytes of each 32 columns, once transposed.
__device__ inline void store_tile(
    storage_t *y, const float (&sum)[SUMS], const Rows &rows, int column, int n)
{
    column += threadIdx.x % 4 * 8;
    storage_t *const to[2] = {y + (size_t)rows.at[0] * n + column,
                              y + (size_t)rows.at[1] * n + column};
#pragma unroll
    for (int group = 0; group < OUT_N / 32; group++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned word[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = 4 * (4 * group + j) + 2 * half;
                float low = sum[at], high = sum[at + 1];
#if EPILOGUE == SWIGLU
                low = silu(low) * sum[SUMS / 2 + at];
                high = silu(high) * sum[SUMS / 2 + at + 1];
#endif
                word[j] = bits(low, high);
            }
            transpose(word);
            if (rows.real[half] && column + 32 * group < n)
                *reinterpret_cast<uint4 *>(to[half] + 32 * group) =
                    make_uint4(word[0], word[1], word[2], word[3]);
        }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm_sm90(
    storage_t *__restrict__ y,               // (m, n); n is that of y, half of w's with SWIGLU
    const __grid_constant__ TensorMap x,     // (m, k) in boxes of TILE_M rows, 128 bytes wide
    const __grid_constant__ TensorMap w,     // (n or 2 * n, k) in boxes of TILE_N / CLUSTER rows
    const float *__restrict__ row_scale,     // (m,) with FP8
    const float *__restrict__ column_scale,  // (n or 2 * n,) with FP8
    const int *__restrict__ positions,       // (m,) with ROPE
    const float *__restrict__ cos,           // (positions, HEAD_DIM / 2) with ROPE
    const float *__restrict__ sin,           // (positions, HEAD_DIM / 2) with ROPE
    int rotated, int m, int n, int blocks)   // n a multiple of 32, k of 128 bytes: `blocks` times
{
    extern __shared__ __align__(1024) char memory[];
    const unsigned shared = __cvta_generic_to_shared(memory);
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    const int rank = cluster_rank();

    if (threadIdx.x == 0) {
        if (shared % 1024) __trap();  // the swizzle goes by address
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(shared + FULL + 8 * stage, 1);
            init_barrier(shared + EMPTY + 8 * stage, CLUSTER * CONSUMERS * 4);
        }
        publish_barriers();
    }
    cluster_sync();

    // 128 * 40 + 256 * 232 is what a multiprocessor has, in steps of 8.
    if (warpgroup == 0) {
        give_registers_back<40>();
        if (threadIdx.x == 0) produce(shared, x, w, m, n, blocks, rank);
    } else {
        take_registers<232>();
        const unsigned empty = in_block(threadIdx.x % CLUSTER, shared + EMPTY);
        const int tiles = tiles_down(m) * tiles_across(n), consumer = warpgroup - 1;
        float sum[SUMS] = {};
        Ring<STAGES> ring;
        // Consumer 1 stays STAGGER stages behind, so that one multiplies while the other writes.
        if (STAGGER && consumer == 1 && blockIdx.x / CLUSTER < tiles) {
            constexpr int CYCLES = STAGGER * STEPS * TILE_N / 2;
            wait(shared + FULL, 0);
            for (const long long start = clock64(); clock64() - start < CYCLES;) {
            }
        }
        for (int i = blockIdx.x / CLUSTER; i < tiles; i += gridDim.x / CLUSTER) {
            const Tile tile = tile_at(i, m, n, rank);
            const Rows rows(tile.row + 64 * consumer, m);
#if EPILOGUE == ROPE
            const int position[2] = {positions[rows.at[0]], positions[rows.at[1]]};
#endif
            multiply_tile(sum, ring, shared, empty, consumer, blocks);
#if EPILOGUE == ROPE
            Turn turn;
            // On its way while the last stage is multiplied; the scales need the registers before.
            if (!FP8) load_turn(turn, cos, sin, position);
#endif
            drain(sum, ring, empty);
            if (FP8) scale(sum, rows, row_scale, column_scale, tile.column, n);
#if EPILOGUE == ROPE
            if (FP8) load_turn(turn, cos, sin, position);
            rotate(sum, turn, rotated - tile.column);
#endif
            store_tile(y, sum, rows, tile.column, n);
        }
    }
    // No block may leave while the other still brings it news of a stage, or rows of w.
    cluster_sync();
}
