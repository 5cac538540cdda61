// drive.h: what the parts of drive.cpp share.
#pragma once
#include <cmath>
#include <cstdio>

constexpr double kPi = 3.14159265358979323846;
inline int n_wrong = 0;

inline void expect(bool condition, const char* what, double got, double want) {
    if (condition) return;
    if (++n_wrong < 20) std::printf("MISMATCH %s: got %.17g, want %.17g\n", what, got, want);
}
inline void expect_close(double got, double want, double scale, const char* what) {
    expect(std::fabs(got - want) <= 1e-10 * scale, what, got, want);
}

void check_rows();   // drive_rows.cpp: plans, convolutions and norms over lists of rows
void check_scans();  // drive_scans.cpp: preprocessing of scans
