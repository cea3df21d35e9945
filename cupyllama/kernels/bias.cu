// Bias of a matrix product that then accumulates into `rows`:
//     set_bias: rows[t] = bias        add_bias: rows[t] += bias
//
// Grid (tokens, packs / blockDim.x).  OUT_T is the product's type: storage_t or float.
#include "common.cuh"

constexpr int WIDTH =
    pack_width<OUT_T>(WIDE) < pack_width(WIDE) ? pack_width<OUT_T>(WIDE) : pack_width(WIDE);

template <bool ADD>
__device__ inline void apply(OUT_T *rows, const storage_t *bias)
{
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= WIDE) return;
    OUT_T *at = rows + (size_t)blockIdx.x * WIDE + i;
    float y[WIDTH];
    load(y, bias + i);
    if (ADD) {
        float x[WIDTH];
        load(x, at);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) y[j] += x[j];
    }
    store(at, y);
}

extern "C" __global__ void set_bias(
    OUT_T *__restrict__ rows,            // (tokens, WIDE)
    const storage_t *__restrict__ bias)  // (WIDE,)
{
    apply<false>(rows, bias);
}

extern "C" __global__ void add_bias(
    OUT_T *__restrict__ rows,            // (tokens, WIDE)
    const storage_t *__restrict__ bias)  // (WIDE,)
{
    apply<true>(rows, bias);
}
