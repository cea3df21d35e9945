// few_rows_sm90: y = x w^T and what follows it, for int8 w, few rows of x, compute capability 9.0
//
// A tile is ROWS rows of w by all rows of x, TOKENS at most, and takes k by stages.  As in
// few_rows.cu all stages of all tiles stand in one line, each block has an equal piece of it, and a
// tile that several blocks have pieces of is finished by the last of them to arrive, which adds the
// pieces in the order of k: no bit depends on who is last.  Here each warpgroup does so by itself.
//
// wgmma computes y^T = w x^T: a warpgroup's 64 rows of w come from registers, x from shared memory.
// One thread has the copy engine fill a ring of STAGES stages, with both as they lie in memory; the
// others read w from there, two bytes at a time, for wgmma asks two neighbours in k of a lane, and
// make STORAGE of them.  While one warpgroup does that, the others multiply.
//
// Rows g and g + 8 of a warp's A, as hopper.cuh has them, are a pair of rows of w: a lane has both
// sums of it.  sum[4 * j + i] is that of row g + i / 2 * 8, token 8 * j + 2 * t + i % 2.
#define PLAIN_APART 8
#define INT8 1
#include "hopper.cuh"
#include "pairs.cuh"

constexpr int WARPGROUPS = 4;
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int THREADS = CONSUMERS + 128;
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int PAIRS = ROWS / 2;
constexpr int STAGE = 128;         // k of a stage: of w one row of the swizzle, of x two
constexpr int STEPS = STAGE / 16;  // wgmma that a stage feeds
// Of these, how many are begun together, and how many such batches are left under way while the next
// is made ready; more of either would not fit the registers beside the sums of 128 rows.
constexpr int BATCH = 2;
constexpr int BEHIND = 1;
constexpr int W_BYTES = ROWS * STAGE;
constexpr int X_BYTES = TOKENS * STAGE * 2;
constexpr int FULL = STAGES * (W_BYTES + X_BYTES);  // where the barriers lie in shared memory
constexpr int EMPTY = FULL + 8 * STAGES;
constexpr int IS_LAST = EMPTY + 8 * STAGES;  // a word for each warpgroup
constexpr int SUMS = TOKENS / 2;             // registers of 64 rows
constexpr int PART = SUMS / 4 * CONSUMERS;   // float4 of a tile's sums
// Float4 of another's sums that are read at once; more do not fit beside the sums of 128 rows.
constexpr int JOINED = SUMS / 4 < 8 ? SUMS / 4 : 8;
static_assert(TOKENS % 16 == 0 && STEPS % BATCH == 0 && STAGES >= 2, "");

struct Sizes : Rows {
    int m;
    int stages;  // of a tile
};

// A tile's rows of w in two boxes: with SWIGLU gate and up, else what lies together.  Past its end
// gate runs into up, and all into zeros: rows that nobody stores.
__device__ inline void fetch_w(
    unsigned shared, const TensorMap &w, int item, int slot, const Sizes &sizes)
{
    const int tile = item / sizes.stages, column = item % sizes.stages * STAGE;
    const int row = tile * (EPILOGUE == SWIGLU ? PAIRS : ROWS);
    const unsigned to = shared + slot * W_BYTES, full = shared + FULL + 8 * slot;
    arrive_expecting(full, W_BYTES + X_BYTES);
    copy_box(to, w, row, column, full);
    copy_box(to + W_BYTES / 2, w, row + (EPILOGUE == SWIGLU ? sizes.apart : PAIRS), column, full);
}

__device__ inline void fetch_x(unsigned shared, const TensorMap &x, int item, int slot, int stages)
{
    const int column = item % stages * (STAGE * 2);
    const unsigned to = shared + STAGES * W_BYTES + slot * X_BYTES, full = shared + FULL + 8 * slot;
    copy_box(to, x, 0, column, full);
    copy_box(to + X_BYTES / 2, x, 0, column + 128, full);
}

// What one thread of the last warp does.
__device__ inline void produce(
    unsigned shared, const TensorMap &x, const TensorMap &w, int first, int last,
    const Sizes &sizes)
{
    const int ahead = min(first + STAGES, last);
    for (int item = first; item < ahead; item++) fetch_w(shared, w, item, item - first, sizes);
    // All but w may be what a kernel writes that is still at work.
    wait_for_previous();
    Ring<STAGES> ring;
    for (int item = first; item < last; item++, ring.next()) {
        if (item >= ahead) {
            wait(shared + EMPTY + 8 * ring.at, ring.parity ^ 1);
            fetch_w(shared, w, item, ring.at, sizes);
        }
        fetch_x(shared, x, item, ring.at, sizes.stages);
    }
}

// A lane's numbers of 16 of k: two and two of each of its rows of w, `apart` bytes apart.  `first`
// is where those of step 0 lie; of the others the 16 bytes are permuted alike in both rows.
__device__ inline void load(unsigned (&a)[4], const char *w, int first, int apart, int step)
{
    const char *at = w + (first ^ (step << 4));
#pragma unroll
    for (int half = 0; half < 2; half++, at += apart) {
        const unsigned low = *reinterpret_cast<const unsigned short *>(at);
        const unsigned high = *reinterpret_cast<const unsigned short *>(at + 8);
        widen(a[half], a[2 + half], __byte_perm(low, high, 0x5410));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[i]) :: "memory");
}

__device__ inline void sync_warpgroup(int warpgroup)
{
    asm volatile("bar.sync %0, 128;" :: "r"(warpgroup + 1) : "memory");
}

// Of a tile that blocks `from` to `to` have pieces of: puts this one's sums where the others find
// them.  Returns whether all are there; then the sums are those of all.
__device__ inline bool join(
    float (&sum)[SUMS], float4 *parts, int *arrived, volatile int *is_last, int from, int to, int m)
{
    const int warpgroup = threadIdx.x / 128, block = blockIdx.x;
    parts += threadIdx.x;
    // Of a block's two places in `parts` the first is for a tile that others began.
    float4 *own = parts + ((size_t)block * 2 + (block == from)) * PART;
#pragma unroll
    for (int j = 0; j < SUMS / 4; j++)
        if (j / JOINED * JOINED * 8 < m)
            __stcg(own + j * CONSUMERS, reinterpret_cast<const float4 &>(sum[4 * j]));
    __threadfence();
    sync_warpgroup(warpgroup);
    int *counter = arrived + from * WARPGROUPS + warpgroup;
    if (threadIdx.x % 128 == 0) is_last[warpgroup] = atomicAdd(counter, 1) == to - from;
    sync_warpgroup(warpgroup);
    if (!is_last[warpgroup]) return false;

    __threadfence();
    if (threadIdx.x % 128 == 0) *counter = 0;
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
    for (int other = from; other <= to; other++) {
        const float4 *piece = parts + ((size_t)other * 2 + (other == from)) * PART;
#pragma unroll
        for (int first = 0; first < SUMS / 4; first += JOINED) {
            if (8 * first >= m) break;
            float4 more[JOINED];
#pragma unroll
            for (int i = 0; i < JOINED; i++) more[i] = __ldcg(piece + (first + i) * CONSUMERS);
#pragma unroll
            for (int i = 0; i < JOINED; i++) {
                float *const so_far = sum + 4 * (first + i);
                so_far[0] += more[i].x;
                so_far[1] += more[i].y;
                so_far[2] += more[i].z;
                so_far[3] += more[i].w;
            }
        }
    }
    return true;
}

// Everything that follows the sums of a lane's pair of rows of w.
__device__ inline void finish_pair(
    out_t *y, const float (&sum)[SUMS], int pair, const After &after, const Sizes &sizes)
{
    // Of 8 tokens each: all is read before any is written, and fits the registers beside the sums.
    constexpr int AT_ONCE = TOKENS < 64 ? SUMS / 4 : TOKENS == 64 ? 4 : EPILOGUE == ROPE ? 1 : 2;
#pragma unroll
    for (int first = 0; first < SUMS / 4; first += AT_ONCE) {
        if (8 * first >= sizes.m || pair >= sizes.pairs) break;
        Beside beside[2 * AT_ONCE];
#pragma unroll
        for (int i = 0; i < 2 * AT_ONCE; i++) {
            const int token = (first + i / 2) * 8 + threadIdx.x % 4 * 2 + i % 2;
            beside[i].read(y, min(token, sizes.m - 1), pair, after, sizes);
        }
#pragma unroll
        for (int i = 0; i < 2 * AT_ONCE; i++) {
            const int token = (first + i / 2) * 8 + threadIdx.x % 4 * 2 + i % 2;
            const int at = 4 * (first + i / 2) + i % 2;
            if (token < sizes.m)
                finish(y, {sum[at], sum[at + 2]}, token, pair, beside[i], after, sizes);
        }
    }
}

__device__ inline void consume(
    out_t *y, char *memory, const After &after, float4 *parts, int *arrived, const Line &line,
    int first, int last, const Sizes &sizes)
{
    const unsigned shared = __cvta_generic_to_shared(memory);
    const int lane = threadIdx.x % 32, own_pair = threadIdx.x / 32 * 8 + lane / 4;
    // A tile begins with a head, or with the first of 16 rows: its rows lie in it as in w.
    const int row = sizes.low(own_pair);
    const int apart = EPILOGUE == SWIGLU ? PAIRS : EPILOGUE == ROPE ? sizes.apart : PLAIN_APART;
    const int first_byte = row * STAGE + (row % 8 << 4) + lane % 4 * 2;
    float sum[SUMS] = {};
    int tile = first / sizes.stages, begun = first;
    Ring<STAGES> ring;
    wait_for_previous();
    for (int item = first; item < last; item++, ring.next()) {
        const char *w = memory + ring.at * W_BYTES;
        const auto x = rows_at(shared + STAGES * W_BYTES + ring.at * X_BYTES);
        wait(shared + FULL + 8 * ring.at, ring.parity);
#pragma unroll
        for (int batch = 0; batch < STEPS; batch += BATCH) {
            unsigned a[BATCH][4];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                load(a[i], w, first_byte, apart * STAGE, batch + i);
            begin();
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int step = batch + i;
                multiply<0>(sum, a[i], x + step / 4 * (X_BYTES / 32) + step % 4 * (32 / 16),
                            step || item != begun);
            }
            commit();
            // What one batch was fed from is needed again for the next but one.
            if (batch + BATCH < STEPS) finish<BEHIND>();
        }
        finish<0>();
        release(shared + EMPTY + 8 * ring.at);
        const int next = (tile + 1) * sizes.stages;
        if (item + 1 < min(next, last)) continue;

        pin(sum);
        const int from = line.block_of(tile * sizes.stages), to = line.block_of(next - 1);
        volatile int *is_last = reinterpret_cast<volatile int *>(memory + IS_LAST);
        if (from == to || join(sum, parts, arrived, is_last, from, to, sizes.m))
            finish_pair(y, sum, tile * PAIRS + own_pair, after, sizes);
        __syncwarp();
        tile++;
        begun = item + 1;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_rows_sm90(
    out_t *y,                             // (m, n), or (m, n / 2) with SWIGLU
    const __grid_constant__ TensorMap x,  // (m, k) in boxes of TOKENS rows, 128 bytes wide
    const __grid_constant__ TensorMap w,  // (n, k) in boxes of PAIRS rows, 128 bytes wide
    const float *__restrict__ scale,      // (n,)
    const storage_t *__restrict__ bias,   // (n,) or null
    const int *__restrict__ positions,    // (m,) with ROPE
    const float *__restrict__ cos,        // (positions, apart) with ROPE
    const float *__restrict__ sin,        // (positions, apart) with ROPE
    float4 *parts,  // (blocks, 2, PART): of a first, of a last tile; null where none is shared
    int *arrived,                         // (blocks, WARPGROUPS), zero before and after
    int m, int n, int k, int apart, int rotated, int accumulate)  // with ROPE apart divides PAIRS
{
    extern __shared__ __align__(1024) char memory[];
    const unsigned shared = __cvta_generic_to_shared(memory);
    const int pairs = EPILOGUE == PLAIN || EPILOGUE == RELU ? (n + 15) / 16 * 8 : n / 2;
    const Sizes sizes = {{n, pairs, apart}, m, (k + STAGE - 1) / STAGE};
    const Line line = {(long long)((pairs + PAIRS - 1) / PAIRS) * sizes.stages, (int)gridDim.x};
    const int first = line.begin(blockIdx.x), last = line.begin(blockIdx.x + 1);

    let_next_start();
    if (threadIdx.x == 0) {
        if (shared % 1024) __trap();  // the swizzle goes by address
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(shared + FULL + 8 * stage, 1);
            init_barrier(shared + EMPTY + 8 * stage, CONSUMERS / 32);
        }
        publish_barriers();
    }
    __syncthreads();
    // 128 * 32 + 512 * 112 is what 640 threads of 96 have.
    if (threadIdx.x >= CONSUMERS) {
        give_registers_back<32>();
        if (threadIdx.x == CONSUMERS) produce(shared, x, w, first, last, sizes);
    } else {
        take_registers<112>();
        consume(y, memory, {scale, bias, positions, cos, sin, rotated, accumulate}, parts, arrived,
                line, first, last, sizes);
    }
}
