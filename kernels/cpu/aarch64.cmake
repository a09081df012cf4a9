# Builds for aarch64 by the cross compiler of Debian's g++-aarch64-linux-gnu; CONTRIBUTING.md has the command for wheels.
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=kernels/cpu/aarch64.cmake -DCMAKE_BUILD_TYPE=Release
#   cmake --build build/aarch64
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
