// x W₁ · GELU(x W₂) with weights that stay in shared memory; see ../geglu.py, which writes the constants above this.
//
// A program keeps the rows of one panel, HIDDEN values' and HIDDEN gates', and streams tokens past them, 64 at a time:
// two warpgroups take turns, so that one's gates are computed while the other multiplies. Tiles lie in slices of 8
// channels as hopper.cuh says. The panel's rows are ordered so that a thread's accumulators are 8 neighbouring channels.

#define PANEL (2 * HIDDEN)
#define STEP 64                         // channels of a piece of x
#define STEPS (K / STEP)
#define PIECE_BYTES (64 * STEP * 2)
#define PANEL_BYTES (PANEL * K * 2)
#define SLOTS 8

// row of the panel -> hidden channel: accumulator 8 (4 a + b) + 2 q + e of a half is channel 32 a + 8 q + 2 b + e
__device__ __forceinline__ int channel_of(int n) { return (n & ~31) | ((n >> 1) & 3) << 3 | ((n >> 3) & 3) << 1 | (n & 1); }

// x Φ(x), Φ by Abramowitz & Stegun 7.1.26: erf to 1.5e-7
__device__ __forceinline__ float gelu(float x) {
  float z = fabsf(x) * 0.7071067811865476f, t, tail;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(z, 0.3275911f, 1.0f)));
  float y = fmaf(fmaf(fmaf(fmaf(t, 1.061405429f, -1.453152027f), t, 1.421413741f), t, -0.284496736f), t, 0.254829592f);
  tail = 0.5f * t * y * exp2_hardware(z * z * -1.4426950408889634f);
  return x * (x >= 0.0f ? 1.0f - tail : tail);
}

// piece of 64 rows by 64 channels: 16 lanes' pairs of 16 bytes are 16 rows, so neither side has conflicts
__device__ __forceinline__ void copy_piece(u32 to, const unsigned short* x, int x_row, int row, int M, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = 16 * warp + lane / 2, slice = 2 * i + lane % 2;
    const u32 bytes = row + r < M ? 16 : 0;
    copy16(to + slice * 1024 + r * 16, bytes ? x + (long long)(row + r) * x_row + 8 * slice : x, bytes);
  }
}

__device__ __forceinline__ float to_float(u32 bits) {
  if (ONE == 0x3f80) return __int_as_float(bits << 16);  // bfloat16
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)bits));
  return y;
}

extern "C" __global__ void __launch_bounds__(384, 1)
geglu(const unsigned short* __restrict__ x, const unsigned short* __restrict__ weight,
      const unsigned short* __restrict__ bias, unsigned short* __restrict__ out, int M, int H, int x_row) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 panel = shared_address(shared), ring = panel + PANEL_BYTES, biases = ring + SLOTS * PIECE_BYTES;
  const u32 filled = biases + PANEL * 4, emptied = filled + 8 * SLOTS, panel_filled = emptied + 8 * SLOTS;
  const u32 panel_emptied = panel_filled + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = (M + 63) / 64, total = blocks * (H / HIDDEN);  // of tokens; of work
  const int begin = (int)((long long)total * blockIdx.x / gridDim.x);
  const int end = (int)((long long)total * (blockIdx.x + 1) / gridDim.x);

  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      init_barrier(filled + 8 * i, 128);
      init_barrier(emptied + 8 * i, 4);
    }
    init_barrier(panel_filled, 128);
    init_barrier(panel_emptied, 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp >= 8) {  // copies
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    const int own = warp - 8;
    int slot = 0, round = 0, panels = 0, last = -1;  // last: the slot whose copies were begun but not yet told of
    for (int unit = begin; unit < end;) {
      const int at = unit / blocks * HIDDEN, stop = min(end, (unit / blocks + 1) * blocks);
      if (last >= 0) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        publish();
        arrive(filled + 8 * last);
        last = -1;
      }
      if (panels > 0) wait(panel_emptied, (panels - 1) & 1);
      for (int i = threadIdx.x - 256; i < PANEL * (K / 8); i += 128) {
        const int n = i % PANEL, slice = i / PANEL;
        const int row = (n < HIDDEN ? 0 : H) + at + channel_of(n % HIDDEN);
        copy16(panel + (slice * PANEL + n) * 16, weight + (long long)row * K + 8 * slice, 16);
      }
      for (int i = threadIdx.x - 256; i < PANEL; i += 128) {
        const u32 bits = (u32)bias[(i < HIDDEN ? 0 : H - HIDDEN) + at + i];
        *reinterpret_cast<float*>(shared + (biases - panel) + 4 * i) = to_float(bits);
      }
      asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
      publish();
      arrive(panel_filled);
      panels++;
      for (; unit < stop; unit++) {
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
          if (round > 0) wait(emptied + 8 * slot, (round - 1) & 1);
          copy_piece(ring + slot * PIECE_BYTES, x + step * STEP, x_row, unit % blocks * 64, M, own, lane);
          asm volatile("cp.async.commit_group;" ::: "memory");
          if (last >= 0) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
            publish();
            arrive(filled + 8 * last);
          }
          last = slot;
          if (++slot == SLOTS) slot = 0, round++;
        }
      }
    }
    if (last >= 0) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      publish();
      arrive(filled + 8 * last);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int group = warp / 4;
    float c[HIDDEN];  // 64 × PANEL accumulators of a warpgroup
    int panels = 0;
    for (int unit = begin; unit < end;) {
      const int at = unit / blocks * HIDDEN, first = unit, stop = min(end, (unit / blocks + 1) * blocks);
      wait(panel_filled, panels & 1);
      for (unit += (first - begin + group) % 2; unit < stop; unit += 2) {
        int place = (unit - begin) * STEPS;
        hold<HIDDEN>(c);
#pragma unroll 1
        for (int step = 0; step < STEPS; step++, place++) {
          const int slot = place % SLOTS;
          wait(filled + 8 * slot, (place / SLOTS) & 1);
          const u64 a = describe(ring + slot * PIECE_BYTES, 1024, 128);
          const u64 b = describe(panel + step * (STEP / 8) * PANEL * 16, PANEL * 16, 128);
          begin_products();
#pragma unroll
          for (int i = 0; i < STEP / 16; i++) panel_step(c, a + i * 128, b + i * 2 * PANEL, step > 0 || i > 0);
          end_products();
          if (step > 0) {
            wait_products<1>();
            if (lane == 0) arrive(emptied + 8 * ((place - 1) % SLOTS));
          }
        }
        wait_products<0>();
        hold<HIDDEN>(c);
        if (lane == 0) arrive(emptied + 8 * ((place - 1) % SLOTS));

#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = unit % blocks * 64 + warp % 4 * 16 + lane / 4 + 8 * r;
          if (row >= M) continue;
          unsigned short* to = out + (long long)row * H + at + 8 * (lane % 4);
#pragma unroll
          for (int a = 0; a < HIDDEN / 32; a++) {
            const float4* bv = reinterpret_cast<const float4*>(shared + (biases - panel)) + 8 * a + 2 * (lane % 4);
            const float4* bg = bv + HIDDEN / 4;
            const float4 v0 = bv[0], v1 = bv[1], g0 = bg[0], g1 = bg[1];
            const float* s = c + 16 * a + 2 * r;
            const float* g = s + HIDDEN / 2;
            uint4 both;
            both.x = pack((s[0] + v0.x) * gelu(g[0] + g0.x), (s[1] + v0.y) * gelu(g[1] + g0.y));
            both.y = pack((s[4] + v0.z) * gelu(g[4] + g0.z), (s[5] + v0.w) * gelu(g[5] + g0.w));
            both.z = pack((s[8] + v1.x) * gelu(g[8] + g1.x), (s[9] + v1.y) * gelu(g[9] + g1.y));
            both.w = pack((s[12] + v1.z) * gelu(g[12] + g1.z), (s[13] + v1.w) * gelu(g[13] + g1.w));
            *reinterpret_cast<uint4*>(to + 32 * a) = both;
          }
        }
      }
      unit = stop;
      if (lane == 0) arrive(panel_emptied);
      panels++;
    }
  }
}
