// Aligned scratch memory that counts itself, so that a call can say what it took.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace flashmaps::FLASHMAPS_ISA {
namespace {

// Bytes of this call's buffers, which are all made before the threads start and held to the end.
// When planning, buffers are counted and stay null.
struct Workspace {
  std::int64_t bytes = 0;
  bool planning = false;
};

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Workspace& workspace, std::int64_t count) {
    if (count <= 0) return;
    const std::size_t bytes = (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
    workspace.bytes += std::int64_t(bytes);
    if (workspace.planning) return;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace
}  // namespace flashmaps::FLASHMAPS_ISA
