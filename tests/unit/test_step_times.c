/* The median of the steps' times: exact for few, near it for many, in bounded memory; the first step is left out. */
#include <criterion/criterion.h>
#include <math.h>

#include "command/step_times.h"

Test(step_times, exact_without_the_first) {
  phx__step_times t;
  cr_assert_eq(phx__step_times_open(&t, 6, NULL), PHX_OK);
  cr_expect_eq(phx__step_times_median(&t), 0.0);
  const double seconds[] = {100, 5, 1, 4, 2, 9};
  phx__step_times_add(&t, seconds[0]);
  cr_expect_eq(phx__step_times_median(&t), 100.0, "there is no other");
  for (int i = 1; i < 6; i++) phx__step_times_add(&t, seconds[i]);
  cr_expect_eq(phx__step_times_median(&t), 4.0);
  phx__step_times_close(&t);
  cr_assert_eq(phx__step_times_open(&t, 5, NULL), PHX_OK);
  for (int i = 0; i < 5; i++) phx__step_times_add(&t, seconds[i]);
  cr_expect_eq(phx__step_times_median(&t), 3.0, "between 2 and 4");
  phx__step_times_close(&t);
}

/* A thousand million steps are configured; three million of them are done.  The times run through [0, 1) evenly. */
Test(step_times, near_it_in_bounded_memory) {
  phx__step_times t;
  cr_assert_eq(phx__step_times_open(&t, 1000000000, NULL), PHX_OK);
  cr_assert_leq(t.room, 65536);
  double at = 0;
  for (int i = 0; i < 3000000; i++) {
    at += 0.6180339887498949;
    at -= floor(at);
    phx__step_times_add(&t, at);
  }
  cr_expect_leq(t.n, t.room);
  cr_expect_geq(t.n, t.room / 4);
  cr_expect_float_eq(phx__step_times_median(&t), 0.5, 0.01);
  phx__step_times_close(&t);
}
