/* Loaded before all other libraries of a process (LD_PRELOAD), hides AVX-512, AVX-VNNI, AVX-IFMA, AMX and AVX10 from
 * them: Linux lets CPUID fault, and what it would have said is answered without these bits. The instructions
 * still run. Threads and forked children inherit it; run.py has the rest. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012 }; /* ARCH_SET_CPUID of <asm/prctl.h> */

#define BIT(n) (UINT32_C(1) << (n))

struct answer {
  uint32_t a, b, c, d;
};

static struct answer ask(uint32_t leaf, uint32_t part) {
  struct answer r;
  syscall(SYS_arch_prctl, kSetCpuid, 1);
  __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(part));
  syscall(SYS_arch_prctl, kSetCpuid, 0);
  if (leaf == 7 && part == 0) {
    /* AVX-512: F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS,
     * VP2INTERSECT, FP16. AMX: BF16, TILE, INT8. */
    r.b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    r.c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    r.d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23) | BIT(22) | BIT(24) | BIT(25));
  } else if (leaf == 7 && part == 1) {
    /* AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16,
     * AVX10. */
    r.a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
    r.d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));
  } else if (leaf == 0xd && part == 0) {
    r.a &= 7; /* of the registers that are saved, those of x87, SSE and AVX */
  } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
    r = (struct answer){0}; /* about AMX and AVX10 */
  }
  return r;
}

static struct sigaction others; /* what the process would do with a true fault */
static int (*set_action)(int, const struct sigaction*, struct sigaction*);
static volatile sig_atomic_t ended; /* a true fault has come: nothing is hidden from what its handler does */

static void fault(int sig, siginfo_t* info, void* context) {
  greg_t* const g = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* const at = (const uint8_t*)g[REG_RIP];
  /* CPUID faults by a general protection fault, which has no address and is SI_KERNEL. Where code cannot be
   * read, the fault is another one. */
  if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) {
    ended = 1;
    set_action(sig, &others, NULL); /* and the instruction faults again */
    return;
  }
  const struct answer r = ask((uint32_t)g[REG_RAX], (uint32_t)g[REG_RCX]);
  g[REG_RAX] = r.a, g[REG_RBX] = r.b, g[REG_RCX] = r.c, g[REG_RDX] = r.d;
  g[REG_RIP] += 2;
}

/* Handlers that others set, Python's faulthandler say, wait for a true fault. */
__attribute__((visibility("default"))) int sigaction(int sig, const struct sigaction* action,
                                                     struct sigaction* before) {
  if (set_action == NULL) set_action = dlsym(RTLD_NEXT, "sigaction");
  if (sig != SIGSEGV || ended) return set_action(sig, action, before);
  const struct sigaction last = others;
  if (action != NULL) others = *action;
  if (before != NULL) *before = last;
  return 0;
}

__attribute__((constructor)) static void hold(void) {
  static const char kNot[] = "this machine cannot let CPUID fault\n";
  struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  if (set_action == NULL) set_action = dlsym(RTLD_NEXT, "sigaction");
  set_action(SIGSEGV, &action, &others);
  if (syscall(SYS_arch_prctl, kSetCpuid, 0) != 0) {
    if (write(2, kNot, sizeof kNot - 1) < 0) _exit(2);
    _exit(1);
  }
}
