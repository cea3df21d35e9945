// layernorm: out[t] = (x[t] - mean(x[t])) / sqrt(mean((x[t] - mean)^2) + eps) * weight + bias
//
// A row is read once: it stays in registers from the first sum to the product, and with QUANTIZE also
// until its largest number is known, by which e4m3 is scaled.  Squares are taken of what is left
// without the mean: their mean less the mean's square has no digits left where the mean is large.
// One block of THREADS a row.
#define WIDTH pack_width(HIDDEN)
#define PACKS (HIDDEN / WIDTH)
#include "row.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) layernorm(
#if QUANTIZE
    unsigned char *__restrict__ out,       // (tokens, HIDDEN) e4m3
    float *__restrict__ scale,             // (tokens,)
#else
    storage_t *__restrict__ out,           // (tokens, HIDDEN)
#endif
    const storage_t *__restrict__ x,       // (tokens, HIDDEN)
    const storage_t *__restrict__ weight,  // (HIDDEN,)
    const storage_t *__restrict__ bias,    // (HIDDEN,)
    float eps)
{
    let_next_start();
    const storage_t *from = x + (size_t)blockIdx.x * HIDDEN;
    float row[SLOTS][WIDTH];
    for_each_pack([&](int slot, int pack) { load(row[slot], from + pack * WIDTH); });
    float sum = 0;
    for_each_pack([&](int slot, int) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += row[slot][i];
    });
    const float mean = block_sum(sum) / HIDDEN;
    float squares = 0;
    for_each_pack([&](int slot, int) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            row[slot][i] -= mean;
            squares += row[slot][i] * row[slot][i];
        }
    });
    const float factor = rsqrtf(block_sum(squares) / HIDDEN + eps);
    for_each_pack([&](int slot, int pack) {
        float w[WIDTH], b[WIDTH];
        load(w, weight + pack * WIDTH);
        load(b, bias + pack * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) row[slot][i] = row[slot][i] * factor * w[i] + b[i];
    });
#if QUANTIZE
    store_row(out + (size_t)blockIdx.x * HIDDEN, scale + blockIdx.x, row);
#else
    store_row(out + (size_t)blockIdx.x * HIDDEN, row);
#endif
}
