// What the kernels of compute capability 9.0 share: barriers in shared memory, copies that arrive
// at them, and products by wgmma, for which a warpgroup of 128 threads works together.
//
// Products are of STORAGE, or with -DFP8=1 of e4m3, for which a must be in shared memory too.
//
// Addresses of shared memory are 32-bit numbers.  A wait at a barrier names the parity of the phase
// that it waits for; for the phase before the first it returns at once.
//
// Registers of wgmma (PTX ISA, 9.7.15): each of the four warps has 16 rows; with g = lane / 4 and
// t = lane % 4, element i of c is row g + i / 2 % 2 * 8, column i / 4 * 8 + 2 * t + i % 2, and a is
// held as by mma.m16n8k16.
#include "common.cuh"

// How a matrix lies in global memory and what boxes it is copied in: the host fills it.
struct alignas(64) TensorMap {
    char opaque[128];
};

__device__ inline int cluster_rank()  // of this block
{
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of block `rank` of the cluster.
__device__ inline unsigned in_block(int rank, unsigned address)
{
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ inline void init_barrier(unsigned barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

__device__ inline void arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Makes barriers that this thread has initialised known to the cluster and to the copy engine.
__device__ inline void publish_barriers()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and the phase awaits `bytes` from the copy engine besides; they may come before.
__device__ inline void arrive_expecting(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

// Arrives at a barrier of any block of the cluster, as in_block() gives it.  It says nothing of
// what was written: .release.cluster would, and its fence over the GPU takes long.
__device__ inline void arrive_in_block(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrives when all that this thread has asked cp.async for is there.
__device__ inline void arrive_when_copied(unsigned barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

__device__ inline void wait(unsigned barrier, unsigned parity)
{
    int done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                     " selp.b32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// Where a thread is in a ring of COUNT buffers: the one that is next, and the parity of its barriers'
// current phase.
template <int COUNT>
struct Ring {
    int at = 0;
    unsigned parity = 0;

    __device__ inline void next()
    {
        at = at == COUNT - 1 ? 0 : at + 1;
        parity ^= at == 0;
    }

    __device__ inline int before() const { return at ? at - 1 : COUNT - 1; }
};

// 16 bytes from global to shared memory, or that many zeros.
__device__ inline void copy_async(unsigned to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

// One thread has the copy engine fetch the box that begins at (row, column), zeros where it leaves
// the matrix.
__device__ inline void copy_box(
    unsigned to, const TensorMap &from, int row, int column, unsigned barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The same to the same place in each of the cluster's `blocks`, whose own barriers count the bytes.
__device__ inline void copy_box_to_all(
    unsigned to, const TensorMap &from, int row, int column, unsigned barrier, int blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier),
                    "h"((unsigned short)((1 << blocks) - 1)) : "memory");
}

// Where unit `unit` of row `row` lies in a matrix of `rows` rows: 128 bytes of each row together,
// their units permuted by the row, so that neither rows nor columns meet in a bank.
__device__ inline unsigned swizzled(int row, int unit, int rows)
{
    return unit / 8 * rows * 128 + row * 128 + ((unit % 8 ^ row % 8) << 4);
}

// Registers a thread from here on, in multiples of 8; every warp of a warpgroup asks for the same.
template <int COUNT>
__device__ inline void give_registers_back()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

template <int COUNT>
__device__ inline void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

__device__ inline unsigned bits(float a, float b)  // as wgmma takes two numbers
{
    Pack<storage_t, 2> pair;
    from_float(pair.x[0], a);
    from_float(pair.x[1], b);
    return reinterpret_cast<const unsigned &>(pair);
}

// A matrix in shared memory as wgmma takes it: swizzled over 128 bytes, groups of 8 rows 1024 bytes
// apart, counted in units of 16.  `low` is its address, and in the upper half the way from one
// column of 128 bytes to the next where these are rows of B.
__device__ inline unsigned long long matrix(unsigned low)
{
    return (unsigned long long)(1u << 30 | 1024 / 16) << 32 | low;
}

// The same of rows of 128 bytes, of which one multiply() takes 32.
__device__ inline unsigned long long rows_at(unsigned address)
{
    return matrix(address / 16 | 1 << 16);
}

#if FP8
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 "
#define NOT_TRANSPOSED ""
#else
#if STORAGE == FP16
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#endif
#define NOT_TRANSPOSED ", 0, 0"
#endif
#define FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 4), FOUR(c, i + 8), FOUR(c, i + 12)
#define SIXTY_FOUR(c, i) SIXTEEN(c, i), SIXTEEN(c, i + 16), SIXTEEN(c, i + 32), SIXTEEN(c, i + 48)
#define OPERANDS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define OPERANDS_16 OPERANDS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define OPERANDS_32 OPERANDS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_48 OPERANDS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OPERANDS_64 OPERANDS_48 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_128 OPERANDS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
    "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c += a b, or c = a b: 64 x 16 by 16 x COLUMNS; in memory a row is a column of b, of b itself where
// TRANSPOSED is 1.  After REGISTERS stand the numbers of the operands behind those of c and a[0].
#define MULTIPLY(COLUMNS, REGISTERS, A1, A2, A3, B, ACCUMULATE, HOW, ...)                          \
    template <int TRANSPOSED>                                                                      \
    __device__ inline void multiply(                                                               \
        float (&c)[REGISTERS], const unsigned (&a)[4], unsigned long long b, int accumulate)       \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; " WGMMA(COLUMNS)          \
                     "{" OPERANDS_##REGISTERS "}, {%" #REGISTERS ", %" #A1 ", %" #A2 ", %" #A3     \
                     "}, %" #B ", p, 1, 1, %" #HOW ";}"                                            \
                     : __VA_ARGS__                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),        \
                       "n"(TRANSPOSED));                                                           \
    }
MULTIPLY(16, 8, 9, 10, 11, 12, 13, 14, FOUR(c, 0), FOUR(c, 4))
MULTIPLY(32, 16, 17, 18, 19, 20, 21, 22, SIXTEEN(c, 0))
MULTIPLY(64, 32, 33, 34, 35, 36, 37, 38, SIXTEEN(c, 0), SIXTEEN(c, 16))
MULTIPLY(96, 48, 49, 50, 51, 52, 53, 54, SIXTEEN(c, 0), SIXTEEN(c, 16), SIXTEEN(c, 32))
MULTIPLY(128, 64, 65, 66, 67, 68, 69, 70, SIXTY_FOUR(c, 0))

// c += a b, or c = a b: 64 rows and 256 columns over 32 bytes of each, both in memory: there a row
// is a row of a, a column of b.
__device__ inline void multiply(
    float (&c)[128], unsigned long long a, unsigned long long b, int accumulate)
{
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0; " WGMMA(256)
                 "{" OPERANDS_128 "}, %128, %129, p, 1, 1" NOT_TRANSPOSED ";}"
                 : SIXTY_FOUR(c, 0), SIXTY_FOUR(c, 64)
                 : "l"(a), "l"(b), "r"(accumulate));
}

__device__ inline void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps what is computed before from moving behind what comes after, and the other way round.
template <int N>
__device__ inline void pin(float (&c)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i]) :: "memory");
}

// Waits until at most PENDING groups are under way.
template <int PENDING>
__device__ inline void finish()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

template <int PENDING, int N>
__device__ inline void finish(float (&c)[N])  // c: what a finished one computed
{
    finish<PENDING>();
    pin(c);
}

// What was written by cp.async becomes visible to wgmma, which reads shared memory its own way.
__device__ inline void see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// This warp has read what the barrier guards.
__device__ inline void release(unsigned barrier)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

// A 4 x 4 transpose over the lanes of a quad: lane t's word i goes to lane i's word t.
__device__ inline void transpose(unsigned (&word)[4])
{
    const int lane = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned got = __shfl_xor_sync(ALL_LANES, lane & 1 ? word[i] : word[i + 1], 1);
        word[i] = lane & 1 ? got : word[i];
        word[i + 1] = lane & 1 ? word[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned got = __shfl_xor_sync(ALL_LANES, lane & 2 ? word[i] : word[i + 2], 2);
        word[i] = lane & 2 ? got : word[i];
        word[i + 2] = lane & 2 ? word[i + 2] : got;
    }
}
