// A block's search for the most likely tokens of a row of logits.
//
// A token's likelihood is 2^-octaves, octaves = (peak - logit) * scale, as an integer of
// WEIGHT_BITS bits that is shifted left: sums of integers are the same in any order.
// sampling_reference.py has the same integers.
//
// Where the wanted tokens end is found by a histogram over bins of 1/64 octave, in which logits lie
// far enough apart that its atomic additions seldom meet.  The tokens of the bin go to a list,
// which is sorted.  Where they are too many for it, as equal ones may be, more histograms split the
// bin, by eleven bits of the tokens' keys each.
#define STORAGE FP32
#include "common.cuh"

typedef unsigned long long Wide;

static_assert(THREADS == 1024, "a lane for every warp, and a thread for every two bins");
constexpr int WARPS = THREADS / 32;
constexpr int OCTAVES = 32;  // tokens further below the peak weigh nothing
constexpr int BINS_PER_OCTAVE = 64;
constexpr int BINS = OCTAVES * BINS_PER_OCTAVE;  // two for each thread; number BINS is the rest
constexpr int LIST = THREADS;
constexpr int NO_TOKEN = -1;  // cupyllama/generation/settings.py

constexpr int WIDTH = pack_width<float>(VOCAB);
constexpr int DEPTH = 8 / WIDTH;  // loads in flight: 32 KiB in all hide the L2 cache's latency
constexpr int SPAN = 32 * WIDTH;
// Tokens of a warp, which are neighbours.
constexpr int CHUNK = (VOCAB + WARPS * SPAN - 1) / (WARPS * SPAN) * SPAN;

// What a key is made of: the bits of the logit, 32, and the token, of which 20 are used.
static_assert(VOCAB < 1 << 20, "the last histogram splits ids by 11 bits above 9");
constexpr int ALL_BITS = 64, TOKEN_BITS = 32, LAST_BITS = 9;

constexpr float TWO_23 = 8388608;  // floats of this size have no bits for fractions
constexpr int TWO_23_BITS = 0x4b000000;

struct Row {
    const float *logits;  // (VOCAB,)
    float peak;           // the largest
    float scale;          // octaves in a unit
    float least;          // tokens below it are left out
};

// Tokens of a bin whose keys have the same bits from `unknown` on.
struct Group {
    int bin, unknown;
    Wide prefix;
    Wide before;      // what all tokens that are more likely amount to
    unsigned inside;  // at least as many tokens
};

struct Space {
    unsigned histogram[BINS];
    Wide list[LIST];
    Wide partial[WARPS];
    Group found;
    float threshold;
    int listed;
};

template <typename Use>
__device__ inline void for_each_token(const float *logits, Use use)
{
    const int first = threadIdx.x / 32 * CHUNK, end = min(VOCAB, first + CHUNK);
    for (int i = first + threadIdx.x % 32 * WIDTH; i < end; i += DEPTH * SPAN) {
        float x[DEPTH][WIDTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (i + d * SPAN < end) load(x[d], logits + i + d * SPAN);
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (i + d * SPAN >= end) break;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) use(x[d][j], i + d * SPAN + j);
        }
    }
}

// Sum over the threads before this one; `total` is that over all.
__device__ inline Wide sum_before(Wide own, Wide *partial, Wide &total)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Wide sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Wide other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();  // an earlier call may still be reading
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    Wide warps = partial[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Wide other = __shfl_up_sync(ALL_LANES, warps, step);
        if (lane >= step) warps += other;
    }
    total = __shfl_sync(ALL_LANES, warps, 31);
    const Wide earlier = __shfl_sync(ALL_LANES, warps, max(warp, 1) - 1);
    return sum - own + (warp ? earlier : 0);
}

__device__ inline int warp_min(int x)
{
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x = min(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// The largest logit, NaN aside, and the lowest token that has it: NO_TOKEN, if one is NaN or
// infinity, or all are -infinity.
__device__ inline float find_peak(const float *logits, int &token, Space &space)
{
    float peak = -infinity();
    bool broken = false;
    token = VOCAB;
    for_each_token(logits, [&](float x, int id) {
        broken |= !(x < infinity());  // NaN too
        if (x > peak) {  // strictly: the lowest token wins a tie
            peak = x;
            token = id;
        }
    });
    const float own = peak;
    peak = warp_max(peak);
    token = warp_min(own == peak ? token : VOCAB);
    float *peaks = reinterpret_cast<float *>(space.histogram);
    int *ids = reinterpret_cast<int *>(space.histogram) + WARPS;
    if (threadIdx.x % 32 == 0) {
        peaks[threadIdx.x / 32] = peak;
        ids[threadIdx.x / 32] = token;
    }
    broken = __syncthreads_or(broken);
    const float other = peaks[threadIdx.x % 32];
    peak = warp_max(other);
    token = warp_min(other == peak ? ids[threadIdx.x % 32] : VOCAB);
    if (broken || token == VOCAB) token = NO_TOKEN;
    __syncthreads();  // histogram is free again
    return peak;
}

__device__ inline float octaves_below(const Row &row, float x)
{
    return __fmul_rn(__fsub_rn(row.peak, x), row.scale);
}

__device__ inline int floor_of(float x)  // from 0 to 2^23
{
    return __float_as_int(__fadd_rd(x, TWO_23)) - TWO_23_BITS;
}

// NaN and what is left out are in the rest, in every pass: the list has room for no more than the
// histogram has counted.
__device__ inline int bin_of(const Row &row, float x)
{
    const float octaves = octaves_below(row, x);
    return x >= row.least && octaves < OCTAVES ? floor_of(octaves * BINS_PER_OCTAVE) : BINS;
}

// What a weight is before the shift: 2^(WEIGHT_BITS - the fraction of octaves).
__device__ inline unsigned mantissa(float octaves)
{
    const float fraction = __fsub_rn(octaves, __fsub_rn(__fadd_rd(octaves, TWO_23), TWO_23));
    float sum = -0.000944903702f;
    sum = fmaf(sum, fraction, 0.00920579862f);
    sum = fmaf(sum, fraction, -0.0552973598f);
    sum = fmaf(sum, fraction, 0.24018015f);
    sum = fmaf(sum, fraction, -0.693143725f);
    sum = fmaf(sum, fraction, 1.0f);
    return __float_as_int(fmaf(sum, 1 << WEIGHT_BITS, TWO_23)) - TWO_23_BITS;
}

__device__ inline Wide weight(const Row &row, float x)
{
    if (!(x >= row.least)) return 0;  // NaN too
    const float octaves = octaves_below(row, x);
    return octaves < OCTAVES ? (Wide)mantissa(octaves) << (OCTAVES - 1 - floor_of(octaves)) : 0;
}

// Grows from the most likely token to the least: the logit's bits, of equal ones the token.
__device__ inline Wide key_of(float x, int token)
{
    const int bits = __float_as_int(__fadd_rn(fmaxf(x, -infinity()), 0.0f));  // no NaN, no -0
    const unsigned order = bits < 0 ? bits : ~bits & 0x7fffffff;
    return (Wide)order << 32 | token;
}

__device__ inline float logit_of(Wide key)
{
    const unsigned order = key >> 32;
    return __int_as_float(order >> 31 ? order : ~order & 0x7fffffff);
}

__device__ inline Wide known(Wide key, int unknown)
{
    return unknown < ALL_BITS ? key >> unknown : 0;
}

// The bin, or else the digit of keys, with which what amounts to `need` ends, and what comes before
// it.  False if all of the histogram is less; `before` is with all of it then.
template <bool WEIGHTS>
__device__ inline bool find_digit(Space &space, Group &group, Wide need, bool bins, int &digit)
{
    const int first = 2 * threadIdx.x;
    Wide amounts[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int bin = bins ? first + i : group.bin;
        const Wide sum = space.histogram[first + i];
        amounts[i] = WEIGHTS ? sum << (OCTAVES - 1 - bin / BINS_PER_OCTAVE) : sum;
    }
    Wide total;
    Wide before = group.before + sum_before(amounts[0] + amounts[1], space.partial, total);
    if (group.before + total < need) {
        group.before += total;
        return false;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (before < need && need <= before + amounts[i]) {
            space.found.prefix = first + i;
            space.found.before = before;
            // A mantissa has its highest bit.
            space.found.inside = space.histogram[first + i] >> (WEIGHTS ? WEIGHT_BITS - 1 : 0);
        }
        before += amounts[i];
    }
    __syncthreads();
    digit = space.found.prefix;
    group.before = space.found.before;
    group.inside = space.found.inside;
    return true;
}

__device__ inline void clear(Space &space)
{
    __syncthreads();  // somebody may still be reading
    for (int i = threadIdx.x; i < BINS; i += THREADS) space.histogram[i] = 0;
    __syncthreads();
}

// Count the tokens, or add their weights up, by bins.
template <bool WEIGHTS>
__device__ inline void fill_bins(Space &space, const Row &row)
{
    clear(space);
    for_each_token(row.logits, [&](float x, int) {
        const int bin = bin_of(row, x);
        if (bin == BINS) return;
        atomicAdd(&space.histogram[bin], WEIGHTS ? mantissa(octaves_below(row, x)) : 1);
    });
    __syncthreads();
}

// The part of the group in which `need` is reached, by the next bits of the keys.
template <bool WEIGHTS>
__device__ inline void split(Space &space, const Row &row, Group &group, Wide need)
{
    // From 64 to 53, 42, 32 and 9; ids have no bits from 20 on.
    const int unknown = group.unknown > 42           ? group.unknown - 11
                        : group.unknown > TOKEN_BITS ? TOKEN_BITS
                                                     : LAST_BITS;
    clear(space);
    for_each_token(row.logits, [&](float x, int id) {
        if (bin_of(row, x) != group.bin) return;
        const Wide key = key_of(x, id);
        if (known(key ^ group.prefix, group.unknown)) return;
        const unsigned amount = WEIGHTS ? mantissa(octaves_below(row, x)) : 1;
        atomicAdd(&space.histogram[(key >> unknown) % BINS], amount);
    });
    __syncthreads();
    int digit;
    find_digit<WEIGHTS>(space, group, need, false, digit);
    group.prefix |= (Wide)digit << unknown;
    group.unknown = unknown;
}

// How many keys the group has, or the group and all before it; they are in space.list, sorted.
__device__ inline int list_keys(Space &space, const Row &row, const Group &group, bool all)
{
    if (threadIdx.x == 0) space.listed = 0;
    __syncthreads();
    for_each_token(row.logits, [&](float x, int id) {
        const int bin = bin_of(row, x);
        if (all ? bin > group.bin : bin != group.bin) return;
        const Wide key = key_of(x, id);
        if (bin == group.bin) {
            const Wide own = known(key, group.unknown), last = known(group.prefix, group.unknown);
            if (all ? own > last : own != last) return;
        }
        space.list[atomicAdd(&space.listed, 1)] = key;
    });
    __syncthreads();
    const int listed = space.listed;
    int size = 1;
    while (size < listed) size *= 2;
    if (threadIdx.x >= listed && threadIdx.x < size) space.list[threadIdx.x] = ~0ull;
    // Bitonic: runs of `run` are sorted upwards and downwards in turn.
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step; step /= 2) {
            __syncthreads();
            const int low = threadIdx.x, high = low ^ step;
            if (high > low && high < size) {
                const Wide a = space.list[low], b = space.list[high];
                if ((a > b) == !(low & run)) {
                    space.list[low] = b;
                    space.list[high] = a;
                }
            }
        }
    }
    __syncthreads();
    return listed;
}
