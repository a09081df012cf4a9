#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "errors.h"
#include "sha256.h"

namespace diffpress {

namespace {

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File open_file(const std::string& path) {
  File file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw UserError(path + " cannot be read: " + std::strerror(errno) + ". Unzip the bundle again.");
  return file;
}

bool is_link(const std::string& path) {
  struct stat found;
  return lstat(path.c_str(), &found) == 0 && S_ISLNK(found.st_mode);
}

}  // namespace

std::string inside(const std::string& folder, const std::string& name) {
  bool safe = !name.empty() && name[0] != '/' && name.find('\0') == std::string::npos;
  for (std::size_t start = 0; safe && start <= name.size();) {
    const std::size_t end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    safe = part != ".." && !part.empty() && !is_link(folder + "/" + name.substr(0, end));
    start = end + 1;
  }
  if (!safe) throw UserError("the path \"" + name + "\" leaves the bundle, which is not safe to use.");
  return folder + "/" + name;
}

std::string read_file(const std::string& path, std::size_t limit) {
  const File file = open_file(path);
  std::string bytes;
  std::vector<char> piece(1 << 16);
  while (const std::size_t count = std::fread(piece.data(), 1, piece.size(), file.get())) {
    if (bytes.size() + count > limit) throw UserError(path + " is larger than any that diffpress writes. Unzip the bundle again.");
    bytes.append(piece.data(), count);
  }
  if (std::ferror(file.get())) throw UserError(path + " cannot be read. Unzip the bundle again.");
  return bytes;
}

void check_file(const std::string& folder, const std::string& name, std::uint64_t size, const std::string& sha256) {
  const File file = open_file(inside(folder, name));
  Sha256 digest;
  std::uint64_t total = 0;
  std::vector<unsigned char> piece(1 << 18);
  while (const std::size_t count = std::fread(piece.data(), 1, piece.size(), file.get())) {
    digest.update(piece.data(), count);
    total += count;
  }
  if (total != size || digest.hexadecimal() != sha256)
    throw UserError(name + " is not what was packaged (its digest differs). Unzip the bundle again.");
}

void write_file(const std::string& path, const std::string& bytes) {
  const std::string written = path + ".part-" + std::to_string(getpid());
  File file(std::fopen(written.c_str(), "wbx"), std::fclose);
  const bool whole = file && std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size() &&
                     std::fflush(file.get()) == 0 && std::rename(written.c_str(), path.c_str()) == 0;
  const int error = errno;
  if (whole) return;
  if (file) std::remove(written.c_str());
  throw UserError("--out " + path + " cannot be written: " + std::strerror(error) + ". Name another place.");
}

}  // namespace diffpress
