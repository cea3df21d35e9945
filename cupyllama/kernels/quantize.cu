// quantize: out[r] = e4m3(x[r] / scale[r]),  scale[r] = max |x[r]| / 448, or with QUANTIZE INT8
//           out[r] = round(x[r] / scale[r]), scale[r] = max |x[r]| / 127
//
// A row is read once: it stays in registers until its largest number is known.  One block of THREADS
// a row.
#define WIDTH pack_width(COLUMNS)
#define PACKS (COLUMNS / WIDTH)
#include "row.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) quantize(
    unsigned char *__restrict__ out,  // (rows, COLUMNS) e4m3 or int8
    float *__restrict__ scale,        // (rows,)
    const storage_t *__restrict__ x)  // (rows, COLUMNS)
{
    const storage_t *from = x + (size_t)blockIdx.x * COLUMNS;
    float row[SLOTS][WIDTH];
    for_each_pack([&](int slot, int pack) { load(row[slot], from + pack * WIDTH); });
    store_row(out + (size_t)blockIdx.x * COLUMNS, scale + blockIdx.x, row);
}
