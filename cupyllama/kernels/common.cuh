// What the kernels share: the storage type, aligned packs of it, and sums over a block.
//
// -DSTORAGE=FP16, BF16 or FP32 says how numbers lie in memory; arithmetic is float everywhere.
#define FP16 1
#define BF16 2
#define FP32 3

#if STORAGE == FP16
#include <cuda_fp16.h>
typedef __half storage_t;
__device__ inline float to_float(storage_t x) { return __half2float(x); }
__device__ inline void from_float(storage_t &y, float x) { y = __float2half_rn(x); }
#elif STORAGE == BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 storage_t;
__device__ inline float to_float(storage_t x) { return __bfloat162float(x); }
__device__ inline void from_float(storage_t &y, float x) { y = __float2bfloat16_rn(x); }
#elif STORAGE == FP32
typedef float storage_t;
#else
#error "compile with -DSTORAGE=FP16, BF16 or FP32"
#endif

// float is also what biases are added to and logits are, whatever STORAGE is.
__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float &y, float x) { y = x; }

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// N numbers that move in one access.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T x[N];
};

template <int N, typename T>
__device__ inline void load(float (&x)[N], const T *p)
{
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N> *>(p);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(pack.x[i]);
}

template <int N, typename T>
__device__ inline void store(T *p, const float (&x)[N])
{
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) from_float(pack.x[i], x[i]);
    *reinterpret_cast<Pack<T, N> *>(p) = pack;
}

// The most numbers, up to 16 bytes of them, by which rows of n can be cut evenly: 8, 4, 2 or 1.
template <typename T = storage_t>
__device__ constexpr int pack_width(int n)
{
    int width = 16 / sizeof(T);
    while (n % width) width /= 2;
    return width;
}

__device__ inline float warp_sum(float x)
{
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ inline float warp_max(float x)
{
#pragma unroll
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// __fdividef is 0 by 2^126 and above, and by infinity if exp(-gate) overflows: as it should be.
__device__ inline float silu(float gate) { return __fdividef(gate, 1 + __expf(-gate)); }

// The next kernel, where its launch allows it, may start as soon as all blocks of this one have: for
// kernels that a matrix product follows, since no other is launched so.  Before it has waited, by
// `griddepcontrol.wait`, a product reads weights alone and writes nothing, so that x, a residual and
// what the pool has handed out again are left alone till then.  It waits for the end of this kernel,
// and that is the end of all before it too: this one either started after them, or has itself waited
// for the one in front, which did.  Never in a kernel that writes weights.
__device__ inline void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
