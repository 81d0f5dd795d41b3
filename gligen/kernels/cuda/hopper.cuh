// What kernels for Hopper's tensor cores share: barriers, copies and matrix products as the instructions that they are.
//
// Tiles lie in shared memory in slices of 8 channels: element (row, channel) of a tile of R rows at
// (channel / 8) · 16 R + 16 row + 2 (channel % 8) bytes. 8 rows of a slice are 128 bytes in a row, one of the matrix
// instruction's 8 × 8 cores, so it reads without conflicts whichever way the tile is taken.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// lead, stride: bytes between cores along the sum and across it, or across and along where the tile is taken sideways
__device__ __forceinline__ u64 describe(u32 address, u32 lead, u32 stride) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(lead >> 4) << 16 | (u64)(stride >> 4) << 32;
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\n"
      "DONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy16(u32 to, const void* from, u32 bytes) {  // the rest of 16 bytes becomes 0
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// what ordinary stores and copies have written is seen by the matrix instruction
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// keeps the compiler from moving uses of registers over a wait
template <int N>
__device__ __forceinline__ void hold(float* c) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(u32* c) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float exp2_hardware(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
