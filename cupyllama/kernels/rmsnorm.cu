// rmsnorm: out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight
//
// A row is read once: it stays in registers from the sum to the product, and with QUANTIZE also until
// its largest number is known, by which e4m3 is scaled.  One block of THREADS a row.
#define WIDTH pack_width(HIDDEN)
#define PACKS (HIDDEN / WIDTH)
#include "row.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) rmsnorm(
#if QUANTIZE
    unsigned char *__restrict__ out,       // (tokens, HIDDEN) e4m3
    float *__restrict__ scale,             // (tokens,)
#else
    storage_t *__restrict__ out,           // (tokens, HIDDEN)
#endif
    const storage_t *__restrict__ x,       // (tokens, HIDDEN)
    const storage_t *__restrict__ weight,  // (HIDDEN,)
    float eps)
{
    let_next_start();
    const storage_t *from = x + (size_t)blockIdx.x * HIDDEN;
    float row[SLOTS][WIDTH];
    for_each_pack([&](int slot, int pack) { load(row[slot], from + pack * WIDTH); });
    float sum = 0;
    for_each_pack([&](int slot, int) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += row[slot][i] * row[slot][i];
    });
    const float factor = rsqrtf(block_sum(sum) / HIDDEN + eps);
    for_each_pack([&](int slot, int pack) {
        float w[WIDTH];
        load(w, weight + pack * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) row[slot][i] *= factor * w[i];
    });
#if QUANTIZE
    store_row(out + (size_t)blockIdx.x * HIDDEN, scale + blockIdx.x, row);
#else
    store_row(out + (size_t)blockIdx.x * HIDDEN, row);
#endif
}
