// Calls functions of a library for another process: requests come by standard input, answers go by standard output.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

struct Request {
  char name[32];
  int64_t a[9];
};
// Every argument is a number or an address; a function does not see those that it does not take.
using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

int64_t answer(void* library, const Request& request) {
  const int64_t(&a)[9] = request.a;
  if (std::strcmp(request.name, "write") == 0) {
    return static_cast<int64_t>(std::fread(reinterpret_cast<void*>(a[0]), 1, static_cast<size_t>(a[1]), stdin));
  }
  if (std::strcmp(request.name, "read") == 0) {
    return static_cast<int64_t>(std::fwrite(reinterpret_cast<void*>(a[0]), 1, static_cast<size_t>(a[1]), stdout));
  }
  const auto function = reinterpret_cast<Function>(dlsym(library, request.name));
  return function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  for (Request request; std::fread(&request, sizeof(request), 1, stdin) == 1;) {
    const int64_t result = answer(library, request);
    std::fwrite(&result, sizeof(result), 1, stdout);
    std::fflush(stdout);
  }
}
