// gather: out[i] = table[max(rows[i], 0)]
//
// A copy: numbers are not looked at, so rows are UNITS units of UNIT_BYTES, 16 where the row allows.
// A token that sample could not choose is negative, and comes here before the host sees it.
// One block an output row.

struct alignas(UNIT_BYTES) Unit {
    unsigned char bytes[UNIT_BYTES];
};

extern "C" __global__ void gather(
    Unit *__restrict__ out,          // (n, UNITS)
    const int *__restrict__ rows,    // (n,)
    const Unit *__restrict__ table)  // (rows of the table, UNITS)
{
    const Unit *from = table + (size_t)max(rows[blockIdx.x], 0) * UNITS;
    Unit *to = out + (size_t)blockIdx.x * UNITS;
    for (int i = threadIdx.x; i < UNITS; i += blockDim.x) to[i] = from[i];
}
