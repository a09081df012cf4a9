// onnxruntime by its C interface, opened at run time: one binary for every version from the header's on.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"
#include "third_party/onnxruntime/onnxruntime_c_api.h"

namespace diffpress {

// A tensor that onnxruntime holds.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const OrtApi* api, OrtValue* value) : value_(value, Release{api}) {}

  OrtValue* value() const { return value_.get(); }
  std::vector<std::int64_t> shape() const;
  std::size_t count() const;
  ONNXTensorElementDataType type() const;
  template <typename Number>
  Number* data() const {
    return static_cast<Number*>(bytes());
  }

 private:
  struct Release {
    const OrtApi* api;
    void operator()(OrtValue* value) const { api->ReleaseValue(value); }
  };
  void* bytes() const;
  std::shared_ptr<OrtValue> value_;
};

using Tensors = std::map<std::string, Tensor>;

class Engine;

// One graph, ready to run.
class Session {
 public:
  Session(const Engine& engine, const std::string& path, const Graph& graph);

  // Every output by its name, of inputs that the graph takes and perhaps others.
  Tensors run(const Tensors& inputs) const;

 private:
  const Engine& engine_;
  const Graph& graph_;
  std::unique_ptr<OrtSession, std::function<void(OrtSession*)>> session_;
};

class Engine {
 public:
  // Throws UserError where the library is missing or too old; 0 threads leaves the number to it.
  Engine(const std::string& library, int threads);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::string version() const;
  // A tensor with room for `shape`, to be filled.
  template <typename Number>
  Tensor tensor(const std::vector<std::int64_t>& shape) const;

  const OrtApi* api() const { return api_; }
  // Throws UserError with onnxruntime's words, and releases them.
  void check(OrtStatus* status, const std::string& what) const;

 private:
  friend class Session;
  std::string version_;
  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
  OrtSessionOptions* options_ = nullptr;
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace diffpress
