// gather: out[i] = table[rows[i]]
//
// A copy: numbers are not looked at, so rows are UNITS units of UNIT_BYTES, 16 where the row allows.
// One block an output row.

struct alignas(UNIT_BYTES) Unit {
    unsigned char bytes[UNIT_BYTES];
};

extern "C" __global__ void gather(
    Unit *__restrict__ out,          // (n, UNITS)
    const int *__restrict__ rows,    // (n,)
    const Unit *__restrict__ table)  // (rows of the table, UNITS)
{
    const Unit *from = table + (size_t)rows[blockIdx.x] * UNITS;
    Unit *to = out + (size_t)blockIdx.x * UNITS;
    for (int i = threadIdx.x; i < UNITS; i += blockDim.x) to[i] = from[i];
}
