// dequantize: out[r] = values[r] * scale[r]
//
// By packs of 16 bytes of the result, which the rows are cut into evenly: a warp writes 512 bytes at
// once and reads 256.  A thread has SLOTS packs on their way together.  Blocks of THREADS go over the
// matrix as if it were flat, so that none is left half empty at the end of a row.
#include "common.cuh"

constexpr int WIDTH = pack_width(COLUMNS);
constexpr unsigned ROW_PACKS = COLUMNS / WIDTH;

// As many bytes as a pack has values: as an array they would come in two accesses.
template <int N> struct Bytes;
template <> struct Bytes<8> { typedef unsigned long long type; };
template <> struct Bytes<4> { typedef unsigned type; };
template <> struct Bytes<2> { typedef unsigned short type; };
template <> struct Bytes<1> { typedef unsigned char type; };
typedef Bytes<WIDTH>::type bytes_t;

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    storage_t *__restrict__ out,             // (rows, COLUMNS)
    const signed char *__restrict__ values,  // (rows, COLUMNS)
    const float *__restrict__ scale,         // (rows,)
    unsigned packs)
{
    const unsigned first = blockIdx.x * (SLOTS * THREADS) + threadIdx.x;
    bytes_t bytes[SLOTS];
    float factor[SLOTS];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const unsigned pack = first + slot * THREADS;
        if (pack >= packs) break;
        bytes[slot] = reinterpret_cast<const bytes_t *>(values)[pack];
        factor[slot] = scale[pack / ROW_PACKS];
    }
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const unsigned pack = first + slot * THREADS;
        if (pack >= packs) break;
        float row[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) row[i] = (signed char)(bytes[slot] >> 8 * i) * factor[slot];
        store(out + (size_t)pack * WIDTH, row);
    }
}
