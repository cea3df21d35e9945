// Products of few rows: y = x w^T, where rows of w come in pairs, and what follows it.
//
// EPILOGUE says what follows, on float sums that are rounded once: a bias, and PLAIN: y added, if
// `accumulate`; RELU; SWIGLU: w is gate above up, and y = silu(x gate^T) * (x up^T); ROPE: w is q
// above k above v, and the heads of the first `rotated` columns turn by their row's position.  With
// INT8 w is bytes with a scale a row: read as such, multiplied as numbers of STORAGE, which hold them
// exactly, and scaled when summed.
//
// A pair of rows of w is what belongs together: gate and up, both halves of a head; where nothing does,
// they lie PLAIN_APART.  common.cuh stands before this.

#define PLAIN 0
#define RELU 1
#define SWIGLU 2
#define ROPE 3

typedef OUT_T out_t;

struct Rows {
    int n;
    int pairs;
    int apart;  // of the two of a pair

    __device__ inline int low(int pair) const
    {
        if (EPILOGUE == SWIGLU) return pair;
        const int by = EPILOGUE == ROPE ? apart : PLAIN_APART;  // mostly no division then
        return pair / by * 2 * by + pair % by;
    }
};

// From here on all that the kernels in front have written is there; see common.cuh.
__device__ inline void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Four bytes as two words of two numbers: exact, without a conversion, which has a quarter of the
// rate of what is done here.
__device__ inline void widen(unsigned &first, unsigned &second, unsigned bytes)
{
#if STORAGE == FP16
    // 0x6400 is 1024, where a unit in the last place is 1; signed bytes come 128 too high.
    bytes ^= 0x80808080;
    const unsigned high = 0x64646464, offset = 0x64806480;
    first = __byte_perm(bytes, high, 0x4140);
    second = __byte_perm(bytes, high, 0x4342);
    const __half2 by = reinterpret_cast<const __half2 &>(offset);
    reinterpret_cast<__half2 &>(first) = __hsub2(reinterpret_cast<__half2 &>(first), by);
    reinterpret_cast<__half2 &>(second) = __hsub2(reinterpret_cast<__half2 &>(second), by);
#else
    // 0x4300 is 128, where seven bits follow; the eighth, the sign, makes 256 of what is subtracted.
    const unsigned high = 0x43434343;
    const unsigned both[2] = {__byte_perm(bytes, high, 0x4140), __byte_perm(bytes, high, 0x4342)};
    unsigned *const to[2] = {&first, &second};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned low = both[i] & 0xff7fff7f, sign = both[i] & 0xff80ff80;
        reinterpret_cast<__nv_bfloat162 &>(*to[i]) = __hsub2(
            reinterpret_cast<const __nv_bfloat162 &>(low),
            reinterpret_cast<const __nv_bfloat162 &>(sign));
    }
#endif
}

struct After {
    const float *scale;
    const storage_t *bias;
    const int *positions;
    const float *cos, *sin;
    int rotated, accumulate;
};

// What follows the sum of one token and one pair of rows of w, as far as it is to be read.
struct Beside {
    float scale[2], bias[2], added[2], cos, sin;

    __device__ inline void read(
        const out_t *y, int token, int pair, const After &after, const Rows &rows)
    {
        const int low = rows.low(pair);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(low + half * rows.apart, rows.n - 1);
            if (INT8) scale[half] = after.scale[row];
            bias[half] = after.bias ? to_float(after.bias[row]) : 0;
            // Past L1, which may have kept what was there before a kernel that is just over.
            if (EPILOGUE == PLAIN)
                added[half] =
                    after.accumulate ? to_float(__ldcg(y + (size_t)token * rows.n + row)) : 0;
        }
        if (EPILOGUE == ROPE && low < after.rotated) {
            const size_t at = (size_t)after.positions[token] * rows.apart + pair % rows.apart;
            cos = after.cos[at];
            sin = after.sin[at];
        }
    }
};

__device__ inline void finish(out_t *y, float2 sum, int token, int pair, const Beside &beside,
                              const After &after, const Rows &rows)
{
    const int low = rows.low(pair);
    float value[2] = {sum.x, sum.y};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (INT8) value[half] *= beside.scale[half];
        value[half] += beside.bias[half];
        if (EPILOGUE == PLAIN) value[half] += beside.added[half];
        if (EPILOGUE == RELU && value[half] < 0) value[half] = 0;  // NaN stays
    }
#if EPILOGUE == SWIGLU
    from_float(y[(size_t)token * rows.pairs + pair], silu(value[0]) * value[1]);
#else
#if EPILOGUE == ROPE
    if (low < after.rotated) {
        const float a = value[0], b = value[1];
        value[0] = a * beside.cos - b * beside.sin;
        value[1] = b * beside.cos + a * beside.sin;
    }
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = low + half * rows.apart;
        if (column < rows.n) from_float(y[(size_t)token * rows.n + column], value[half]);
    }
#endif
}

// The line of all stages of all tiles, and where each block's equal piece of it begins.
struct Line {
    long long items;
    int blocks;

    __device__ inline int begin(int block) const { return block * items / blocks; }
    __device__ inline int block_of(int item) const { return ((item + 1ll) * blocks - 1) / items; }
};
