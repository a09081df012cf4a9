#include "memory.h"

#include <sys/resource.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace diffpress {

namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

// What a file of /proc says in a line "NAME   NUMBER kB".
std::optional<std::uint64_t> line_of(const char* path, const std::string& wanted) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, wanted.size(), wanted) == 0) return std::strtoull(line.c_str() + wanted.size(), nullptr, 10) * 1024;
  return std::nullopt;
}

std::uint64_t of_machine() {
  if (const auto bytes = line_of("/proc/meminfo", "MemAvailable:")) return *bytes;
  struct sysinfo found;
  return sysinfo(&found) == 0 ? std::uint64_t{found.totalram} * found.mem_unit : kUnlimited;
}

// Where a container has no limit the file says "max", which is no number.
std::uint64_t of_container(const char* path) {
  std::ifstream file(path);
  std::uint64_t bytes;
  return file >> bytes ? bytes : kUnlimited;
}

std::uint64_t of_process() {
  rlimit limit;
  return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY ? limit.rlim_cur : kUnlimited;
}

}  // namespace

std::uint64_t free_memory_bytes() {
  return std::min({of_machine(), of_container("/sys/fs/cgroup/memory.max"),
                   of_container("/sys/fs/cgroup/memory/memory.limit_in_bytes"), of_process()});
}

std::uint64_t peak_memory_bytes() {
  // What the system counts for a process goes back to before it became this program.
  if (const auto bytes = line_of("/proc/self/status", "VmHWM:")) return *bytes;
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace diffpress
