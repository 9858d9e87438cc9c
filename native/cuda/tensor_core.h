// The instructions that have no C++ spelling: bf16 tensor-core products, their fragments' loads from shared memory, asynchronous
// copies from global to shared memory, and powers of two (PTX ISA, sec. "Warp-level matrix instructions", "cp.async" and "ex2";
// sm_80 and later). The host simulator has each under the same name (native/test/cuda_sim).
#pragma once

#include "cuda/launch.h"

#ifdef __CUDACC__

namespace lora_da::cuda {

// d [16, 8] += a [16, 16] b [16, 8], one warp together. Lane l holds, with g = l / 4 and t = l % 4, two columns to a register:
//   a[0] row g, columns 2t, 2t+1;  a[1] row g+8;  a[2] row g, columns 2t+8, 2t+9;  a[3] row g+8, columns 2t+8, 2t+9
//   b[0] rows 2t, 2t+1 of column g;  b[1] rows 2t+8, 2t+9
//   d[0], d[1] row g, columns 2t, 2t+1;  d[2], d[3] row g+8
__device__ inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 tiles of 16-bit elements from shared memory: lanes 8i .. 8i+7 give the addresses of tile i's rows (16 bytes each,
// aligned to 16); lane l receives elements 2 (l % 4) and the next of row l / 4 of tile i in r[i].
__device__ inline void loadTiles(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each tile transposed: lane l receives column l / 4, rows 2 (l % 4) and the next.
__device__ inline void loadTilesTransposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Copies 16 bytes, both addresses aligned to 16, without waiting; with `inside` false 16 zero bytes are written and `global` is
// not read.
__device__ inline void copyAsync16(void* shared, const void* global, bool inside) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
// Closes the group of this thread's copies since the last one.
__device__ inline void commitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most `pending` of this thread's groups are under way. Other threads' copies need a barrier after it.
template <int pending>
__device__ inline void waitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// 2^x with an error of 2 units in the last place; 0 instead of a subnormal number. One instruction, where exp2f, which has those,
// takes four.
__device__ inline float exp2Flushed(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace lora_da::cuda

#endif
