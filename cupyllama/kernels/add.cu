// Sums that no matrix product takes in, in the place of their first term:
//     add: rows[t] += others[t]
//     add_bias: rows[t] += bias        add_bias_relu: rows[t] = max(rows[t] + bias, 0)
//
// Grid (tokens, packs / blockDim.x).  ROWS_T is the type of the rows: storage_t or float.
#include "common.cuh"

constexpr int WIDTH =
    pack_width<ROWS_T>(WIDE) < pack_width(WIDE) ? pack_width<ROWS_T>(WIDE) : pack_width(WIDE);

// TERM_ROWS: each row has a term of its own.
template <bool TERM_ROWS, bool RELU>
__device__ inline void add_to(ROWS_T *rows, const storage_t *term)
{
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= WIDE) return;
    const size_t row = (size_t)blockIdx.x * WIDE;
    float x[WIDTH], y[WIDTH];
    load(x, rows + row + i);
    load(y, term + (TERM_ROWS ? row : 0) + i);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        x[j] += y[j];
        if (RELU && x[j] < 0) x[j] = 0;  // not fmaxf, which hides NaN
    }
    store(rows + row + i, x);
}

extern "C" __global__ void add(
    ROWS_T *__restrict__ rows,             // (tokens, WIDE)
    const storage_t *__restrict__ others)  // (tokens, WIDE)
{
    add_to<true, false>(rows, others);
}

extern "C" __global__ void add_bias(
    ROWS_T *__restrict__ rows,           // (tokens, WIDE)
    const storage_t *__restrict__ bias)  // (WIDE,)
{
    add_to<false, false>(rows, bias);
}

extern "C" __global__ void add_bias_relu(
    ROWS_T *__restrict__ rows,           // (tokens, WIDE)
    const storage_t *__restrict__ bias)  // (WIDE,)
{
    add_to<false, true>(rows, bias);
}
