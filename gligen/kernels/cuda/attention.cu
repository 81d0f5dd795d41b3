// Attention over two key/value segments; see ../hopper.py, which writes the matrix products above this.

#define D 40           // channels of a head
#define KD 48          // the same in whole steps of the matrix instruction
#define WARPGROUPS 3   // of 64 queries each
#define KEYS 128       // of a block
#define STAGES 4       // blocks in the ring
#define SLICES (D / 8)
#define PADDED_SLICES (KD / 8)
#define QUERY_BYTES (PADDED_SLICES * 64 * 16)  // of one warpgroup
#define KEY_BYTES (PADDED_SLICES * KEYS * 16)
#define VALUE_BYTES ((SLICES + 1) * KEYS * 16)  // with a column of ones: its product is the sum of the weights
#define STAGE_BYTES (KEY_BYTES + VALUE_BYTES)
#define THREADS (WARPGROUPS * 128 + 128)
#define ONE 0x3f80      // in bfloat16
#define LOWEST __int_as_float(0xff800000)

struct Segment {
  const unsigned short* k;
  const unsigned short* v;
  int k_row, v_row;
};

// One block's scores to weights: s becomes 2^(scale·s - top), rows' running maximum moves on; returns in `shrink`
// what the earlier weights must be multiplied by. A thread holds two rows: s[4i], s[4i+1] of one, s[4i+2], s[4i+3] of the
// row eight below.
__device__ __forceinline__ void soften(float* s, float* top, float* shrink, float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m = top[r];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) m = fmaxf(m, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
    shrink[r] = exp2_hardware((top[r] - m) * scale);
    top[r] = m;
    const float offset = -m * scale;
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++)
        s[4 * i + 2 * r + e] = exp2_hardware(fmaf(s[4 * i + 2 * r + e], scale, offset));
    }
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
  hold<D / 2 + 4>(o);
  hold<KEYS / 4>(p);
  begin_products();
#pragma unroll
  for (int i = 0; i < KEYS / 16; i++) values_step(o, p + 4 * i, v_at + i * 16, 1);
  end_products();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention(const unsigned short* __restrict__ q, Segment first, Segment second, unsigned short* __restrict__ out,
          long long q_batch, long long k_batch, long long v_batch, long long k2_batch,
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
  for (int i = threadIdx.x; i < STAGES * KEYS; i += THREADS)
    *reinterpret_cast<uint4*>(shared + WARPGROUPS * QUERY_BYTES + (i / KEYS) * STAGE_BYTES + KEY_BYTES +
                              SLICES * KEYS * 16 + (i % KEYS) * 16) = make_uint4(ONE, 0, 0, 0);
  publish();
  __syncthreads();

  if (warp >= WARPGROUPS * 4) {  // the warpgroup that copies
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    first.k += image * k_batch + head * D;
    first.v += image * v_batch + head * D;
    second.k += image * k2_batch + head * D;
    second.v += image * v2_batch + head * D;
    // a warp takes a quarter of a block, 5 · 32 pieces of 16 bytes, of which neighbours read neighbouring ones
    int row[5], slice[5], k_at[5], v_at[5];
#pragma unroll
    for (int u = 0; u < 5; u++) {
      row[u] = warp % 4 * (KEYS / 4) + (lane + 32 * u) / SLICES;
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
        for (int u = 0; u < 5; u++) {
          const u32 place = slice[u] * KEYS * 16 + row[u] * 16;
          copy16(to + place, k + k_at[u], 16);
          copy16(to + KEY_BYTES + place, v + v_at[u], 16);
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
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(160));
    const int group = warp / 4;
    const u64 q_at = describe(queries + group * QUERY_BYTES, 1024, 128);
    float s[KEYS / 2], o[D / 2 + 4], top[2] = {LOWEST, LOWEST}, shrink[2];
    u32 p[KEYS / 4];
#pragma unroll
    for (int i = 0; i < D / 2 + 4; i++) o[i] = 0.0f;

    // the last block, the only one with keys to leave out, comes first
    multiply_scores(s, q_at, filled, ring, 0);
    wait_products<0>();
    hold<KEYS / 2>(s);
    const int left = S + N - (blocks - 1) * KEYS - 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      if (8 * (i / 4) + i % 2 >= left) s[i] = LOWEST;
    soften(s, top, shrink, scale);
    round_weights(s, p);

#pragma unroll 1
    for (int j = 1; j < blocks; j++) {  // the exponentials of a block while the weights of the one before meet their values
      multiply_scores(s, q_at, filled, ring, j);
      add_values(o, p, ring, j - 1);
      wait_products<1>();
      hold<KEYS / 2>(s);
      soften(s, top, shrink, scale);
      wait_products<0>();
      hold<D / 2 + 4>(o);
      hold<KEYS / 4>(p);
      if (lane == 0) arrive(emptied + 8 * ((j - 1) % STAGES));
#pragma unroll
      for (int i = 0; i < D / 2 + 4; i++) o[i] *= shrink[i / 2 % 2];
      round_weights(s, p);
    }
    add_values(o, p, ring, blocks - 1);
    wait_products<0>();
    hold<D / 2 + 4>(o);

#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = __shfl_sync(0xffffffff, o[D / 2 + 2 * r], lane & 28);  // of the ones' column
      const int row = start + group * 64 + (warp % 4) * 16 + lane / 4 + 8 * r;
      if (row >= L) continue;
      const float share = 1.0f / total;
      unsigned short* to = out + ((long long)image * L + row) * heads * D + head * D + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < SLICES; i++)
        *reinterpret_cast<u32*>(to + 8 * i) = pack(o[4 * i + 2 * r] * share, o[4 * i + 2 * r + 1] * share);
    }
  }
}
