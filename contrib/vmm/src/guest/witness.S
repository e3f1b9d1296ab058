// The guest: a witness of its own time.
//
// Each vCPU reads CNTVCT_EL0 without end, publishes the largest reading, and records each reading
// that is below one that was published before, or below its own last one. Its virtual timer
// interrupts it once a period. The code runs wherever it is copied to, writes nothing but the
// board, and has no stack.
//
// Registers that are never anything else:
//   x28 the board    x27 this vCPU's record    x26 its index    x25 its last reading
//   x24 the doorbell, whose writes end KVM_RUN with KVM_EXIT_MMIO
// The interrupt handler has x16 to x19 for itself.

    .pushsection .rodata.witness, "a"
    .balign 4096
    .global witness_start
witness_start:

// Entry of every vCPU: by the VMM for vCPU 0, by CPU_ON for the others. x0 is the index.
entry:
    mov     x26, x0
    ldr     x28, board_address
    ldr     x24, doorbell_address
    mov     x1, #{RECORD_SIZE}
    madd    x27, x26, x1, x28
    add     x27, x27, #{RECORDS}

    // Memory is mapped one to one: exclusive loads and stores need normal, cacheable memory.
    adr     x1, translation_table
    msr     ttbr0_el1, x1
    ldr     x1, memory_attributes
    msr     mair_el1, x1
    ldr     x1, translation_control
    msr     tcr_el1, x1
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    mrs     x1, sctlr_el1
    mov     x2, #0x1005                 // I, C, M: caches and translation
    orr     x1, x1, x2
    msr     sctlr_el1, x1
    isb

    adr     x1, vectors
    msr     vbar_el1, x1
    isb

    ldr     x25, [x27, #{LAST}]
    ldr     x1, [x27, #{STARTS}]
    add     x1, x1, #1
    str     x1, [x27, #{STARTS}]
    str     xzr, [x27, #{IS_OFF}]

    // The GIC. The distributor is everybody's, so vCPU 0 enables it before the others are on.
    cbnz    x26, 1f
    ldr     x1, distributor_address
    mov     w2, #0x12                   // GICD_CTLR: ARE, EnableGrp1
    str     w2, [x1]
1:  ldr     x1, redistributor_address
    add     x1, x1, x26, lsl #17        // 128 KiB for each vCPU
    str     wzr, [x1, #0x14]            // GICR_WAKER: awake
    add     x1, x1, #0x10000            // the frame of SGIs and PPIs
    mov     w2, #-1
    str     w2, [x1, #0x80]             // GICR_IGROUPR0: group 1
    mov     w2, #0x80
    strb    w2, [x1, #(0x400 + {TIMER_INTID})]  // GICR_IPRIORITYR
    mov     w2, #(1 << {TIMER_INTID})
    str     w2, [x1, #0x100]            // GICR_ISENABLER0
    mov     x2, #1
    msr     icc_sre_el1, x2
    isb
    mov     x2, #0xff
    msr     icc_pmr_el1, x2
    mov     x2, #1
    msr     icc_igrpen1_el1, x2
    isb

    mrs     x1, cntvct_el0
    ldr     x2, [x28, #{PERIOD}]
    add     x1, x1, x2
    msr     cntv_cval_el0, x1
    str     x1, [x27, #{ARMED}]
    mov     x1, #1                      // ENABLE
    msr     cntv_ctl_el0, x1
    isb
    msr     daifclr, #2

    // Odd vCPUs sleep between bursts of readings; even ones never do.
watch:
    mov     x15, #256
1:  bl      read_the_counter
    sub     x15, x15, #1
    cbnz    x15, 1b
    bl      obey
    tbz     x26, #0, watch
    wfi
    b       watch

// One reading, and what contradicts it.
read_the_counter:
    ldr     x9, [x28, #{ROUND}]
    ldar    x10, [x28]                  // published
    cbz     x10, 1f                     // The branch orders the reading after the load.
1:  isb
    mrs     x11, cntvct_el0

    subs    x12, x10, x11
    add     x13, x27, #{BELOW_PUBLISHED}
    b.hi    8f
2:  subs    x12, x25, x11
    add     x13, x27, #{BELOW_OWN}
    b.hi    9f
3:  mov     x25, x11
    str     x25, [x27, #{LAST}]

4:  ldaxr   x12, [x28]                  // published = max(published, this reading)
    cmp     x11, x12
    b.ls    5f
    stlxr   w13, x11, [x28]
    cbnz    w13, 4b

5:  ldr     x12, [x27, #{READINGS}]
    add     x12, x12, #1
    str     x12, [x27, #{READINGS}]
    ldr     x12, [x27, #{RECORD_ROUND}]
    cmp     x12, x9
    b.eq    6f
    str     x11, [x27, #{FIRST}]
    str     x9, [x27, #{RECORD_ROUND}]
    dmb     ish
    str     w26, [x24]                  // the round's first reading
6:  ret

    // Counts a contradiction at [x13], by x12 ticks.
8:  adr     x14, 2b
    b       7f
9:  adr     x14, 3b
7:  ldr     x8, [x13]
    add     x8, x8, #1
    str     x8, [x13]
    ldr     x8, [x27, #{WORST}]
    cmp     x12, x8
    csel    x8, x12, x8, hi
    str     x8, [x27, #{WORST}]
    br      x14

// Does what the VMM has asked for. CPU_OFF, CPU_ON and SYSTEM_RESET are PSCI calls (DEN0022).
obey:
    ldr     x9, [x28, #{TURN_OFF}]
    lsr     x9, x9, x26
    tbz     x9, #0, 1f
    msr     daifset, #2
    msr     cntv_ctl_el0, xzr
    isb
    mov     x9, #1
    str     x9, [x27, #{IS_OFF}]
    dmb     ish
    str     w26, [x24]
    ldr     w0, psci_cpu_off
    hvc     #0
    b       unexpected

1:  cbnz    x26, 4f
    ldr     x9, [x28, #{RESET}]
    cbz     x9, 2f
    ldr     w0, psci_system_reset
    hvc     #0
    b       unexpected

2:  add     x14, x28, #{TURN_ON}
    ldr     x9, [x14]
    cbz     x9, 4f
    rbit    x9, x9
    clz     x3, x9                      // the context: the index of the lowest bit
    mov     x1, x3                      // the target's MPIDR_EL1.Aff0
    adr     x2, entry
    ldr     w0, psci_cpu_on
    mov     x8, x3
    hvc     #0
    cmn     w0, #4                      // ALREADY_ON: its CPU_OFF is not over
    b.eq    4f
    cbnz    w0, unexpected
    mov     x9, #1
    lsl     x9, x9, x8
3:  ldaxr   x10, [x14]
    bic     x10, x10, x9
    stlxr   w11, x10, [x14]
    cbnz    w11, 3b
4:  ret

// The virtual timer's interrupt: never before CVAL.
interrupt:
    mrs     x16, icc_iar1_el1
    cmp     w16, #{TIMER_INTID}
    b.ne    3f
    isb
    mrs     x17, cntvct_el0
    mrs     x18, cntv_cval_el0
    subs    x18, x17, x18
    b.hs    1f
    ldr     x19, [x27, #{EARLY}]
    add     x19, x19, #1
    str     x19, [x27, #{EARLY}]
    b       2f
1:  ldr     x19, [x27, #{LATEST}]
    cmp     x18, x19
    csel    x19, x18, x19, hi
    str     x19, [x27, #{LATEST}]
2:  ldr     x19, [x28, #{PERIOD}]
    add     x17, x17, x19
    msr     cntv_cval_el0, x17
    str     x17, [x27, #{ARMED}]
    isb
    ldr     x19, [x27, #{INTERRUPTS}]
    add     x19, x19, #1
    str     x19, [x27, #{INTERRUPTS}]
    msr     icc_eoir1_el1, x16
    dmb     ish
    str     w26, [x24]
    eret
3:  ldr     x19, [x27, #{SPURIOUS}]
    add     x19, x19, #1
    str     x19, [x27, #{SPURIOUS}]
    cmp     w16, #1020                  // special INTIDs have no end
    b.hs    4f
    msr     icc_eoir1_el1, x16
4:  eret

// Anything else. The VMM reads the fault when the doorbell rings.
unexpected:
    mrs     x16, esr_el1
    orr     x16, x16, #(1 << 63)
    str     x16, [x27, #{FAULT}]
    mrs     x16, elr_el1
    str     x16, [x27, #{FAULT_AT}]
    dmb     ish
1:  str     w26, [x24]
    wfi
    b       1b

    .balign 8
board_address:          .quad {BOARD_ADDRESS}
doorbell_address:       .quad {DOORBELL_ADDRESS}
distributor_address:    .quad {DISTRIBUTOR_ADDRESS}
redistributor_address:  .quad {REDISTRIBUTOR_ADDRESS}
memory_attributes:      .quad 0xff04    // 0: device nGnRE; 1: normal, write-back
translation_control:    .quad 0x803519  // T0SZ 25, 4 KiB, write-back, inner shareable, EPD1
psci_cpu_off:           .word 0x84000002
psci_cpu_on:            .word 0xc4000003
psci_system_reset:      .word 0x84000009

    .balign 2048
vectors:
    .rept 5
    b       unexpected
    .balign 128
    .endr
    b       interrupt                   // current EL, SP_ELx, IRQ
    .balign 128
    .rept 10
    b       unexpected
    .balign 128
    .endr

    // Level 1: 512 entries of 1 GiB. The first is devices, the second RAM.
    .balign 4096
translation_table:
    .quad 0x0060000000000401            // device, never executed
    .quad 0x0000000040000705            // normal, inner shareable
    .fill 510, 8, 0

    .global witness_end
witness_end:
    .popsection
