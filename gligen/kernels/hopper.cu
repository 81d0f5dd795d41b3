// Attention over two key/value segments; see hopper.py, which writes the constants and the matrix products above this.
//
// Shared memory holds tiles in slices of 8 channels: element (row, channel) of a tile of R rows lies at
// (channel / 8) · 16 R + 16 row + 2 (channel % 8) bytes. 8 rows of a slice are 128 bytes in a row, one of the matrix
// instruction's 8 × 8 cores, so it reads without conflicts whichever way the tile is taken.

#define SLICES (D / 8)
#define PADDED_SLICES (KD / 8)
#define QUERY_BYTES (PADDED_SLICES * 64 * 16)  // of one warpgroup
#define KEY_BYTES (PADDED_SLICES * KEYS * 16)
#define VALUE_BYTES (SLICES * KEYS * 16)
#define STAGE_BYTES (KEY_BYTES + VALUE_BYTES)
#define PERIOD (160 / SLICES)
#define THREADS (WARPGROUPS * 128 + 128)
#define LOWEST __int_as_float(0xff800000)

struct Segment {
  const unsigned short* k;
  const unsigned short* v;
  int k_row, v_row;
};

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
  asm(PACK : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float exp2_hardware(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x = 2^n · 2^f with n the nearest whole number: n joins the exponent's bits, 2^f is a cubic (relative error 7.5e-5, a
// twenty-fifth of the rounding of the weights that follow). The special-function unit gives 16 exponentials a clock, the
// arithmetic units 128 multiply-adds, so that a share of them is better made there (FlashAttention-4's way).
__device__ __forceinline__ float exp2_polynomial(float x) {
  x = fmaxf(x, -126.0f);
  float shifted = x + 12582912.0f;  // 1.5 · 2^23: the sum's last bits are n
  float f = x - (shifted - 12582912.0f);
  float y = fmaf(fmaf(fmaf(0.05517167f, f, 0.24261113f), f, 0.69326099f), f, 0.99992807f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

// One block's scores to weights: s becomes 2^(scale·s - top), rows' running maximum and sum move on; returns in `shrink`
// what the earlier weights must be multiplied by. A thread holds two rows: s[4i], s[4i+1] of one, s[4i+2], s[4i+3] of the
// row eight below.
__device__ __forceinline__ void soften(float* s, float* top, float* total, float* shrink, float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m = top[r];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) m = fmaxf(m, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
    shrink[r] = exp2_hardware((top[r] - m) * scale);
    top[r] = m;
    float offset = -m * scale, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = fmaf(s[4 * i + 2 * r + e], scale, offset);
        float y = (2 * i + e) % 8 < POLYNOMIAL ? exp2_polynomial(x) : exp2_hardware(x);
        s[4 * i + 2 * r + e] = y;
        sum += y;
      }
    }
    total[r] = fmaf(total[r], shrink[r], sum);
  }
}

// Scores' accumulators are laid out as the weights' operand wants them: only the precision changes.
__device__ __forceinline__ void round_weights(const float* s, u32* p) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// s = q · kᵀ of the j-th block in the ring, begun as soon as it is there
__device__ __forceinline__ void multiply_scores(float* s, u64 q_at, u32 filled, u32 ring, int j) {
  wait(filled + 8 * (j % STAGES), (j / STAGES) & 1);
  const u64 k_at = describe(ring + (j % STAGES) * STAGE_BYTES, KEYS * 16, 128);
  hold<KEYS / 2>(s);
  begin_products();
#pragma unroll
  for (int i = 0; i < KD / 16; i++) scores_step(s, q_at + i * 128, k_at + i * 2 * KEYS, i > 0);
  end_products();
}

// o += p · v of the j-th block, begun
__device__ __forceinline__ void add_values(float* o, u32* p, u32 ring, int j) {
  const u64 v_at = describe(ring + (j % STAGES) * STAGE_BYTES + KEY_BYTES, 128, KEYS * 16);
  hold<D / 2>(o);
  hold<KEYS / 4>(p);
  begin_products();
#pragma unroll
  for (int i = 0; i < KEYS / 16; i++) values_step(o, p + 4 * i, v_at + i * 16, 1);
  end_products();
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)
attention(const unsigned short* __restrict__ q, Segment first, Segment second, unsigned short* __restrict__ out,
          float* __restrict__ lse, long long q_batch, long long k_batch, long long v_batch, long long k2_batch,
          long long v2_batch, int q_row, int L, int S, int N, int heads, float scale) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 queries = shared_address(shared), ring = queries + WARPGROUPS * QUERY_BYTES;
  const u32 filled = ring + STAGES * STAGE_BYTES, emptied = filled + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = blockIdx.x * WARPGROUPS * 64;
  const int image = blockIdx.y / heads, head = blockIdx.y % heads, blocks = (S + N + KEYS - 1) / KEYS;

  q += image * q_batch + head * D;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(filled + 8 * i, 128);
      init_barrier(emptied + 8 * i, 4 * WARPGROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < WARPGROUPS * 64 * PADDED_SLICES; i += THREADS) {
    int row = i / PADDED_SLICES, slice = i % PADDED_SLICES;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (slice < SLICES && start + row < L)
      value = *reinterpret_cast<const uint4*>(q + (long long)(start + row) * q_row + slice * 8);
    *reinterpret_cast<uint4*>(shared + (row / 64) * QUERY_BYTES + slice * 1024 + (row % 64) * 16) = value;
  }
  if (KD > D)  // channels that pad a head: 0 in queries and keys alike
    for (int i = threadIdx.x; i < STAGES * KEYS; i += THREADS)
      *reinterpret_cast<uint4*>(shared + WARPGROUPS * QUERY_BYTES + (i / KEYS) * STAGE_BYTES + SLICES * KEYS * 16 +
                                (i % KEYS) * 16) = make_uint4(0, 0, 0, 0);
  publish();
  __syncthreads();

  if (warp >= WARPGROUPS * 4) {  // the warpgroup that copies
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    first.k += image * k_batch + head * D;
    first.v += image * v_batch + head * D;
    second.k += image * k2_batch + head * D;
    second.v += image * v2_batch + head * D;
    // 5 · 32 copies of 16 bytes are PERIOD rows, after which a lane's places repeat; neighbours read neighbouring bytes
    int row[5], slice[5], k_at[5], v_at[5];
#pragma unroll
    for (int u = 0; u < 5; u++) {
      row[u] = (lane + 32 * u) / SLICES;
      slice[u] = (lane + 32 * u) % SLICES;
      k_at[u] = row[u] * first.k_row + 8 * slice[u];
      v_at[u] = row[u] * first.v_row + 8 * slice[u];
    }
    for (int j = 0; j < blocks; j++) {
      const int stage = j % STAGES;
      const u32 to = ring + stage * STAGE_BYTES;
      if (j >= STAGES) wait(emptied + 8 * stage, (j / STAGES - 1) & 1);
      const int begin = (blocks - 1 - j) * KEYS;  // from the last block to the first
      if (begin + KEYS <= S) {
        const unsigned short* k = first.k + (long long)begin * first.k_row;
        const unsigned short* v = first.v + (long long)begin * first.v_row;
#pragma unroll
        for (int g = 0; g < (KEYS / PERIOD + 3) / 4; g++) {
          const int down = (4 * g + warp % 4) * PERIOD;
          if (down >= KEYS) break;
#pragma unroll
          for (int u = 0; u < 5; u++) {
            const u32 place = slice[u] * KEYS * 16 + (down + row[u]) * 16;
            copy16(to + place, k + down * first.k_row + k_at[u], 16);
            copy16(to + KEY_BYTES + place, v + down * first.v_row + v_at[u], 16);
          }
        }
      } else {  // the last of the first segment, the second, and what is beyond: zeros
#pragma unroll 1
        for (int i = threadIdx.x % 128; i < KEYS * SLICES; i += 128) {
          const int r = i / SLICES, c = i % SLICES, key = begin + r;
          const u32 bytes = key < S + N ? 16 : 0, place = c * KEYS * 16 + r * 16;
          const unsigned short *k = first.k, *v = first.v;
          if (key < S) {
            k += (long long)key * first.k_row + 8 * c;
            v += (long long)key * first.v_row + 8 * c;
          } else if (bytes) {
            k = second.k + (long long)(key - S) * second.k_row + 8 * c;
            v = second.v + (long long)(key - S) * second.v_row + 8 * c;
          }
          copy16(to + place, k, bytes);
          copy16(to + KEY_BYTES + place, v, bytes);
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (j > 0) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        publish();
        arrive(filled + 8 * ((j - 1) % STAGES));
      }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    publish();
    arrive(filled + 8 * ((blocks - 1) % STAGES));
  } else {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  const int group = warp / 4;
  const u64 q_at = describe(queries + group * QUERY_BYTES, 1024, 128);
  float s[KEYS / 2], o[D / 2], top[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f}, shrink[2];
  u32 p[KEYS / 4];
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] = 0.0f;

  // the last block, the only one with keys to leave out, comes first
  multiply_scores(s, q_at, filled, ring, 0);
  wait_products<0>();
  hold<KEYS / 2>(s);
  const int left = S + N - (blocks - 1) * KEYS - 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++)
    if (8 * (i / 4) + i % 2 >= left) s[i] = LOWEST;
  soften(s, top, total, shrink, scale);
  round_weights(s, p);

#pragma unroll 1
  for (int j = 1; j < blocks; j++) {  // the exponentials of a block while the weights of the one before meet their values
    multiply_scores(s, q_at, filled, ring, j);
    add_values(o, p, ring, j - 1);
    wait_products<1>();
    hold<KEYS / 2>(s);
    soften(s, top, total, shrink, scale);
    wait_products<0>();
    hold<D / 2>(o);
    hold<KEYS / 4>(p);
    if (lane == 0) arrive(emptied + 8 * ((j - 1) % STAGES));
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= shrink[i / 2 % 2];
    round_weights(s, p);
  }
  add_values(o, p, ring, blocks - 1);
  wait_products<0>();
  hold<D / 2>(o);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
    const int row = start + group * 64 + (warp % 4) * 16 + lane / 4 + 8 * r;
    if (row >= L) continue;
    const float share = 1.0f / total[r];
    unsigned short* to = out + ((long long)image * L + row) * heads * D + head * D + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < SLICES; i++)
      *reinterpret_cast<u32*>(to + 8 * i) = pack(o[4 * i + 2 * r] * share, o[4 * i + 2 * r + 1] * share);
    if (lane % 4 == 0)
      lse[(long long)blockIdx.y * L + row] = top[r] * scale * 0.6931471805599453f + logf(total[r]);
  }
  }
}
