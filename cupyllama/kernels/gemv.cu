// gemv: y = x w^T and what follows it, for a row of x or a few: w is read as fast as it can be copied
//
// Each block has an equal piece of the pairs of rows of w, and reads it as it lies in memory.  K_WARPS
// warps have k between them, which is K; GROUPS groups of so many take every GROUPS'th pair.  A warp
// reads a unit, 512 bytes of one row, in one access; it takes SLICE units of both rows of a pair, and
// then of the next pair, while x for those units stays in its registers.  Where they do not hold x
// for all of k, the pairs are gone through in PASSES.  Each lane has its own ring of DEPTH places
// in shared memory, for 16 bytes of both rows each, and reads there what it copied itself: no warp
// waits for another until a band of BAND pairs is done and their sums come together.
//
// All rows g of a warp's A, as product.cuh has it, are of one row of w here, and all rows g + 8 of the
// other of its pair, but each is another eighth of a unit, and column g of B is that eighth of x: on
// the diagonals of C is what is to be added up.  Seven eighths of the products are for nothing, by
// units that have nothing else to do; to convert and multiply number by number would take longer.
#define PLAIN_APART 1
#include "product.cuh"

constexpr int WARPS = K_WARPS * GROUPS;
constexpr int THREADS = 32 * WARPS;
constexpr int WEIGHT_BYTES = INT8 ? 1 : 2;
constexpr int LANE = 16 / WEIGHT_BYTES;  // numbers of k in a lane's 16 bytes
constexpr int WORDS = LANE / 2;          // of x, for these
constexpr int UNIT = 32 * LANE;
constexpr int PASS = K_WARPS * SLICE * UNIT;
constexpr int PASSES = (K + PASS - 1) / PASS;
constexpr int RING = DEPTH * WARPS * 64;  // units of 16 bytes
constexpr int VALUES = 2 * TOKENS;        // sums of a pair
static_assert(BAND * TOKENS <= THREADS && K % LANE == 0 && 32 % VALUES == 0, "");

// Of this lane's 16 bytes of a unit, the first number of k.
__device__ inline int k_of(int pass, int step)
{
    const int k_warp = threadIdx.x / 32 % K_WARPS;
    return pass * PASS + (step * K_WARPS + k_warp) * UNIT + threadIdx.x % 32 * LANE;
}

// What a warp fetches next: a unit of both rows of a pair.  Past the last, pair is not below end.
struct Source {
    const char *w;
    Rows rows;
    int band, end, last;  // of the pairs of a band; the end of those of the block
    int pair, pass, step;
    const char *row[2];

    __device__ inline void enter(int first)
    {
        band = first;
        end = min(band + BAND, last);
        pass = 0;
        find_pair(band + (int)threadIdx.x / 32 / K_WARPS);
    }

    __device__ inline void find_pair(int next)
    {
        pair = next;
        step = 0;
        const int low = rows.low(min(pair, rows.pairs - 1));
        row[0] = w + (size_t)low * (K * WEIGHT_BYTES);
        // Past the end any row will do: its sum is not stored.
        row[1] = w + (size_t)min(low + rows.apart, rows.n - 1) * (K * WEIGHT_BYTES);
    }

    __device__ inline void fetch(uint4 *to)
    {
        if (pair < end) {
            const int k = k_of(pass, step);
            const bool real = K % PASS == 0 || k < K;
#pragma unroll
            for (int half = 0; half < 2; half++)
                copy_async(to + 32 * half, row[half] + (real ? k * WEIGHT_BYTES : 0), real);
            if (++step == SLICE) {
                if (pair + GROUPS < end)
                    find_pair(pair + GROUPS);
                else if (++pass < PASSES)
                    find_pair(band + (int)threadIdx.x / 32 / K_WARPS);
                else
                    enter(end);
            }
        }
        commit();
    }
};

__device__ inline void read_x(
    unsigned (&words)[TOKENS][SLICE][WORDS], const storage_t *x, int pass, int m)
{
#pragma unroll
    for (int token = 0; token < TOKENS; token++)
#pragma unroll
        for (int step = 0; step < SLICE; step++) {
            const int k = k_of(pass, step);
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                uint4 bits = {0, 0, 0, 0};
                if (token < m && (K % PASS == 0 || k < K))
                    // Past L1, which may have kept what was there before a kernel that is just over.
                    bits = __ldcg(
                        reinterpret_cast<const uint4 *>(x + (size_t)token * K + k + 2 * i));
                words[token][step][i] = bits.x, words[token][step][i + 1] = bits.y;
                words[token][step][i + 2] = bits.z, words[token][step][i + 3] = bits.w;
            }
        }
}

// 16 bytes of each of two rows of w, times x at the same places.
__device__ inline void multiply(
    float (&sum)[TOKENS][4], const uint4 &low, const uint4 &high,
    const unsigned (&x)[TOKENS][SLICE][WORDS], int step)
{
    const unsigned bits[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int i = 0; i < WORDS / 2; i++) {
        unsigned a[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#if INT8
            widen(a[half][0], a[half][1], bits[half][i]);
#else
            a[half][0] = bits[half][2 * i], a[half][1] = bits[half][2 * i + 1];
#endif
        }
#pragma unroll
        for (int token = 0; token < TOKENS; token++)
            mma(sum[token], a[0][0], a[1][0], a[0][1], a[1][1],
                x[token][step][2 * i], x[token][step][2 * i + 1]);
    }
}

// Adds up over lanes what each has COUNT * 2 of, and leaves each lane COUNT, and so on down to one.
template <int COUNT>
__device__ inline void halve(float (&value)[VALUES])
{
    constexpr int WIDTH = 32 * COUNT / VALUES;
    const bool upper = threadIdx.x & WIDTH;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float gone = upper ? value[i] : value[i + COUNT];
        const float kept = upper ? value[i + COUNT] : value[i];
        value[i] = kept + __shfl_xor_sync(ALL_LANES, gone, WIDTH);
    }
    if constexpr (COUNT > 1) halve<COUNT / 2>(value);
}

// What lies on the diagonals, added up, of one token and one row of the pair: lanes have it in the
// order of VALUES, 32 / VALUES of them the same.
__device__ inline float add_diagonals(const float (&sum)[TOKENS][4])
{
    const int lane = threadIdx.x % 32, g = lane / 4;
    const bool here = lane % 4 == g / 2, odd = g % 2;
    float value[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const float(&of)[4] = sum[i / 2];
        value[i] = here ? of[i % 2 * 2 + 1] : 0;
        if (here && !odd) value[i] = of[i % 2 * 2];
    }
    halve<VALUES / 2>(value);
#pragma unroll
    for (int width = 16 / VALUES; width; width /= 2)
        value[0] += __shfl_xor_sync(ALL_LANES, value[0], width);
    return value[0];
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemv(
    out_t *y,                               // (m, n), or (m, n / 2) with SWIGLU
    const storage_t *__restrict__ x,        // (m, K)
    const char *__restrict__ w,             // (n, K) STORAGE, or int8; rows a multiple of 16 bytes
    const float *__restrict__ scale,        // (n,) with INT8
    const storage_t *__restrict__ bias,     // (n,) or null
    const int *__restrict__ positions,      // (m,) with ROPE
    const float *__restrict__ cos,          // (positions, apart) with ROPE
    const float *__restrict__ sin,          // (positions, apart) with ROPE
    int m, int n, int apart, int rotated, int accumulate)
{
    extern __shared__ uint4 ring[];
    float *sums = reinterpret_cast<float *>(ring + RING);  // (2, K_WARPS, BAND, VALUES)

    const Rows rows = {n, (n + 1) / 2, apart};
    const After after = {scale, bias, positions, cos, sin, rotated, accumulate};
    const int first = (unsigned)rows.pairs * blockIdx.x / gridDim.x;
    const int last = (unsigned)rows.pairs * (blockIdx.x + 1) / gridDim.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint4 *const own = ring + warp * (DEPTH * 64) + lane;

    let_next_start();
    Source source = {w, rows};
    source.last = last;
    source.enter(first);
#pragma unroll 1
    for (int i = 0; i < DEPTH - 1; i++) source.fetch(own + 64 * i);
    // All but w may be what a kernel writes that is still at work.
    wait_for_previous();

    unsigned x_words[TOKENS][SLICE][WORDS];
    if (PASSES == 1) read_x(x_words, x, 0, m);
    int slot = 0, turn = 0;
    for (int band = first; band < last; band += BAND, turn ^= 1) {
        const int end = min(band + BAND, last);
        float *const band_sums = sums + turn * (K_WARPS * BAND * VALUES);
        // A thread finishes one token of one pair, and has by then what it needs for it.
        const int token = threadIdx.x % TOKENS, pair = band + threadIdx.x / TOKENS;
        const bool finishes = pair < end && token < m;
        Beside beside;
        if (finishes) beside.read(y, token, pair, after, rows);

        for (int pass = 0; pass < PASSES; pass++) {
            if (PASSES > 1) read_x(x_words, x, pass, m);
            for (int i = warp / K_WARPS; i < end - band; i += GROUPS) {
                float sum[TOKENS][4] = {};
#pragma unroll
                for (int step = 0; step < SLICE; step++) {
                    wait<DEPTH - 2>();
                    source.fetch(own + 64 * (slot ? slot - 1 : DEPTH - 1));
                    multiply(sum, own[64 * slot], own[64 * slot + 32], x_words, step);
                    slot = slot == DEPTH - 1 ? 0 : slot + 1;
                }
                const float value = add_diagonals(sum);
                if (lane % (32 / VALUES) == 0) {
                    const int at = (warp % K_WARPS * BAND + i) * VALUES + lane / (32 / VALUES);
                    band_sums[at] = pass ? band_sums[at] + value : value;
                }
            }
        }
        // Sums of two bands: those of this one are read while warps are at the next already.
        __syncthreads();
        if (finishes) {
            float2 both = {0, 0};
#pragma unroll
            for (int part = 0; part < K_WARPS; part++) {
                const int at = (part * BAND + pair - band) * VALUES + 2 * token;
                both.x += band_sums[at];
                both.y += band_sums[at + 1];
            }
            finish(y, both, token, pair, beside, after, rows);
        }
    }
}
