//! The kernel programs by themselves: each loads, and BPF_PROG_TEST_RUN says what the guard and sk_lookup answer.
