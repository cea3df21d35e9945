// rmsnorm: out[i] = x[r] / sqrt(mean(x[r]^2) + eps) * weight,  r = rows[i], or i without rows
//
// Fused: the gather of rows.  A row is read once: it stays in registers from the sum to the product.
// One block of THREADS an output row; a thread holds SLOTS packs of WIDTH numbers.
#include "common.cuh"

constexpr int WIDTH = pack_width(HIDDEN);
constexpr int PACKS = HIDDEN / WIDTH;
constexpr int SLOTS = (PACKS + THREADS - 1) / THREADS;

__device__ inline float block_sum(float x)
{
    __shared__ float partial[THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) sum += partial[warp];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) rmsnorm(
    storage_t *__restrict__ out,           // (n, HIDDEN)
    const storage_t *__restrict__ x,       // (tokens, HIDDEN)
    const storage_t *__restrict__ weight,  // (HIDDEN,)
    const int *__restrict__ rows,          // (n,) or null
    float eps)
{
    const storage_t *from = x + (size_t)(rows ? rows[blockIdx.x] : blockIdx.x) * HIDDEN;
    storage_t *to = out + (size_t)blockIdx.x * HIDDEN;

    Pack<storage_t, WIDTH> row[SLOTS];
    float sum = 0;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const int pack = threadIdx.x + slot * THREADS;
        if (pack >= PACKS) break;
        row[slot] = reinterpret_cast<const Pack<storage_t, WIDTH> *>(from)[pack];
    }
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        if (threadIdx.x + slot * THREADS >= PACKS) break;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float value = to_float(row[slot].x[i]);
            sum += value * value;
        }
    }
    const float scale = rsqrtf(block_sum(sum) / HIDDEN + eps);
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const int pack = threadIdx.x + slot * THREADS;
        if (pack >= PACKS) break;
        float w[WIDTH];
        load(w, weight + pack * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) w[i] *= to_float(row[slot].x[i]) * scale;
        store(to + pack * WIDTH, w);
    }
}
