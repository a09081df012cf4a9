// aarch64 with products of matrices of bytes: Arm's servers since 2022, Apple's M2 and later. Its products are in i8mm.cpp.
#pragma once

#include "neondot.h"
