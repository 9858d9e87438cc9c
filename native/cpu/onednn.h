// oneDNN with the differences between its major versions 2 (Debian 12) and 3 (Ubuntu 24.04) in one place.
#pragma once

#include <oneapi/dnnl/dnnl.hpp>

namespace lora_da::cpu {

#if DNNL_VERSION_MAJOR >= 3
inline dnnl::matmul::primitive_desc matmulDescription(const dnnl::engine& engine, const dnnl::memory::desc& src,
                                                      const dnnl::memory::desc& weights, const dnnl::memory::desc* bias,
                                                      const dnnl::memory::desc& dst, const dnnl::primitive_attr& attr) {
  return bias ? dnnl::matmul::primitive_desc(engine, src, weights, *bias, dst, attr)
              : dnnl::matmul::primitive_desc(engine, src, weights, dst, attr);
}
inline void appendScale(dnnl::post_ops& ops, float alpha) {
  ops.append_eltwise(dnnl::algorithm::eltwise_linear, alpha, 0.0f);
}
#else
inline dnnl::matmul::primitive_desc matmulDescription(const dnnl::engine& engine, const dnnl::memory::desc& src,
                                                      const dnnl::memory::desc& weights, const dnnl::memory::desc* bias,
                                                      const dnnl::memory::desc& dst, const dnnl::primitive_attr& attr) {
  const auto description = bias ? dnnl::matmul::desc(src, weights, *bias, dst) : dnnl::matmul::desc(src, weights, dst);
  return dnnl::matmul::primitive_desc(description, attr, engine);
}
inline void appendScale(dnnl::post_ops& ops, float alpha) {
  ops.append_eltwise(1.0f, dnnl::algorithm::eltwise_linear, alpha, 0.0f);
}
#endif

}  // namespace lora_da::cpu
