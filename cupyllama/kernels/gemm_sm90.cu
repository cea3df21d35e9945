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
// Registers of wgmma.m64n256 (PTX ISA, 9.7.15): with w = warp % 4, g = lane / 4 and t = lane % 4,
// sum[4 * j + i] is row 16 * w + g + i / 2 * 8, column 8 * j + 2 * t + i % 2.
#include "common.cuh"

#define SWIGLU 1
#define ROPE 2

struct alignas(64) TensorMap {
    char opaque[128];
};

typedef unsigned long long descriptor_t;

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
// 128 * 40 + 256 * 232 is what a multiprocessor has, in steps of 8.
#define PRODUCER_REGISTERS "40"
#define CONSUMER_REGISTERS "232"
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

__device__ inline void wait(unsigned barrier, unsigned parity)
{
    unsigned done;
    do {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// The stage of the ring that is next, and the parity of its barriers' current phase.
struct Place {
    int stage = 0;
    unsigned parity = 0;

    __device__ inline void advance()
    {
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        parity ^= stage == 0;
    }

    __device__ inline int before() const { return stage ? stage - 1 : STAGES - 1; }
};

__device__ inline void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Half a tile's rows of w, to the same place in both blocks, whose own barriers count the bytes.
__device__ inline void fetch_w(
    unsigned to, const TensorMap &w, unsigned barrier, int k_byte, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(to), "l"(&w), "r"(k_byte), "r"(row), "r"(barrier),
                    "h"((unsigned short)((1 << CLUSTER) - 1)) : "memory");
}

__device__ inline void fetch_x(
    unsigned to, const TensorMap &x, unsigned barrier, int k_byte, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(&x), "r"(k_byte), "r"(row), "r"(barrier) : "memory");
}

// What one thread of warpgroup 0 does.  Either block awaits a whole stage, whoever fetches it; what
// the other fetches may come before expect_tx: the phase still lacks the arrival.
__device__ inline void produce(
    unsigned shared, const TensorMap &x, const TensorMap &w, int m, int n, int blocks, int rank)
{
    const int tiles = tiles_down(m) * tiles_across(n);
    Place place;
    for (int i = blockIdx.x / CLUSTER; i < tiles; i += gridDim.x / CLUSTER) {
        const Tile tile = tile_at(i, m, n, rank);
        // With SWIGLU one block fetches gate, the other up.  Past its end gate runs into up, and up
        // into zeros: columns that nobody stores.
        const int w_row = tile.column + rank * (EPILOGUE == SWIGLU ? n : TILE_N / CLUSTER);
        for (int block = 0; block < blocks; block++, place.advance()) {
            const unsigned full = shared + FULL + 8 * place.stage;
            const unsigned x_at = shared + place.stage * X_BYTES;
            const unsigned w_at = shared + STAGES * X_BYTES + place.stage * W_BYTES;
            // Of a fresh barrier the phase before the first counts as complete.
            wait(shared + EMPTY + 8 * place.stage, place.parity ^ 1);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                         :: "r"(full), "r"(X_BYTES + W_BYTES) : "memory");
            fetch_x(x_at, x, full, block * PITCH, tile.row);
            fetch_w(w_at + rank * (W_BYTES / CLUSTER), w, full, block * PITCH, w_row);
        }
    }
}

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)

#if FP8
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 "
#define WGMMA_END ", %128, %129, add, 1, 1;\n}"
#elif STORAGE == FP16
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
#define WGMMA_END ", %128, %129, add, 1, 1, 0, 0;\n}"
#else
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
#define WGMMA_END ", %128, %129, add, 1, 1, 0, 0;\n}"
#endif

// d += x w^T, or = where `add` is 0, for 64 rows and 256 columns over 32 bytes of k.
__device__ inline void wgmma(float (&d)[SUMS], descriptor_t x, descriptor_t w, int add)
{
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n" WGMMA
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
        "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
        "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
        "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
        "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "
        "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "
        "%122, %123, %124, %125, %126, %127}" WGMMA_END
        : SUMS_64(0), SUMS_64(64)
        : "l"(x), "l"(w), "r"(add));
}

// K-major rows of 128 bytes in 128-byte swizzle: 1024 bytes from 8 rows to the next 8.
__device__ inline descriptor_t describe(unsigned address)
{
    return (descriptor_t)1 << 62 | (descriptor_t)(1024 >> 4) << 32 | (descriptor_t)1 << 16 |
           (address & 0x3ffff) >> 4;  // above are bits that say which block of the cluster
}

// Address of the empty barriers of the block to which this lane brings the news: either writes into
// the stages of both.
__device__ inline unsigned empty_barriers(unsigned shared)
{
    unsigned address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address) : "r"(shared + EMPTY), "r"(threadIdx.x % CLUSTER));
    return address;
}

// This warp is done with a stage.
__device__ inline void release(unsigned empty, int stage)
{
    // Not .release.cluster: nothing was written, and its fence over the GPU takes long.
    if (threadIdx.x % 32 < CLUSTER)
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(empty + 8 * stage)
                     : "memory");
}

// Begin the sums of a tile, for this warpgroup's rows; they are there after drain().
__device__ inline void multiply(
    float (&sum)[SUMS], Place &place, unsigned shared, unsigned empty, int consumer, int blocks)
{
    for (int block = 0; block < blocks; block++) {
        const descriptor_t x = describe(shared + place.stage * X_BYTES + consumer * 64 * PITCH);
        const descriptor_t w = describe(shared + STAGES * X_BYTES + place.stage * W_BYTES);
        wait(shared + FULL + 8 * place.stage, place.parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            wgmma(sum, x + (step * 32 >> 4), w + (step * 32 >> 4), step || block);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // All but what was just begun: the stage before is free.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (block) release(empty, place.before());
        place.advance();
    }
}

__device__ inline void drain(float (&sum)[SUMS], const Place &place, unsigned empty)
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(empty, place.before());
    // Keep the compiler from reading sums before the wait.
#pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[i]) :: "memory");
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

// __fdividef is 0 by 2^126 and above, and by infinity if exp(-gate) overflows: as it should be.
__device__ inline float silu(float gate) { return __fdividef(gate, 1 + __expf(-gate)); }

__device__ inline unsigned two(float low, float high)
{
    unsigned word;
#if STORAGE == FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}

// A 4 x 4 transpose over the lanes of a quad: lane t's word i goes to lane i's word t.
__device__ inline void transpose(unsigned (&word)[4])
{
    const int lane = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned got = __shfl_xor_sync(ALL_LANES, lane & 1 ? word[i] : word[i + 1], 1);
        word[i] = lane & 1 ? got : word[i];
        word[i + 1] = lane & 1 ? word[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned got = __shfl_xor_sync(ALL_LANES, lane & 2 ? word[i] : word[i + 2], 2);
        word[i] = lane & 2 ? got : word[i];
        word[i + 2] = lane & 2 ? word[i + 2] : got;
    }
}

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
                word[j] = two(low, high);
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
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));

    if (threadIdx.x == 0) {
        if (shared % 1024) __trap();  // the swizzle goes by address
        for (int stage = 0; stage < STAGES; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared + FULL + 8 * stage)
                         : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                         :: "r"(shared + EMPTY + 8 * stage), "r"(CLUSTER * CONSUMERS * 4)
                         : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " PRODUCER_REGISTERS ";");
        if (threadIdx.x == 0) produce(shared, x, w, m, n, blocks, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " CONSUMER_REGISTERS ";");
        const unsigned empty = empty_barriers(shared);
        const int tiles = tiles_down(m) * tiles_across(n), consumer = warpgroup - 1;
        float sum[SUMS] = {};
        Place place;
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
            multiply(sum, place, shared, empty, consumer, blocks);
#if EPILOGUE == ROPE
            Turn turn;
            // On its way while the last stage is multiplied; the scales need the registers before.
            if (!FP8) load_turn(turn, cos, sin, position);
#endif
            drain(sum, place, empty);
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
