# The restorer: makes the system calls of a table, in a process whose memory is nothing but this.
# A row is eight words: number and flags, six arguments, expected result. Registers:
#   rbx  the row            r15  where the kernel put its vDSO
#   rsp  0; in a thread that was just made, its own table
.text
.globl joey_restore_begin, joey_restore_table, joey_restore_end
joey_restore_begin:
    mov rsi, rsp
    lodsq                           # how many arguments
    lea rsi, [rsi + rax * 8 + 8]
1:  lodsq                           # the environment, up to its end
    test rax, rax
    jnz 1b
2:  lodsq                           # the auxiliary vector: a type,
    mov r15, [rsi]                  # and its value
    add rsi, 8
    cmp rax, 33                     # AT_SYSINFO_EHDR
    je 3f
    test rax, rax
    jnz 2b
3:  mov rbx, [rip + joey_restore_table]
4:  xor esp, esp
5:  mov rax, [rbx]
    mov r12, rax
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov r10, [rbx + 32]
    mov r8, [rbx + 40]
    mov r9, [rbx + 48]
    bt r12, 32                      # the first argument counts from the vDSO
    jnc 6f
    add rdi, r15
6:  cmp eax, 15                     # rt_sigreturn: the last row
    cmove rsp, rdi
    mov eax, eax
    syscall
    test rsp, rsp
    jnz 8f
    bt r12, 33                      # whatever it gives
    jc 7f
    cmp rax, [rbx + 56]
    jne 9f
7:  add rbx, 64
    jmp 5b
8:  mov rbx, rsp
    jmp 4b
9:  mov edi, 2
    lea rsi, [rip + joey_restore_failed]
    lea rdx, [rip + joey_restore_said]
    sub rdx, rsi
    mov eax, 1                      # write
    syscall
    mov edi, 125
    mov eax, 231                    # exit_group
    syscall
joey_restore_failed:
    .ascii "the checkpoint of the VMM's process does not fit this kernel\n"
joey_restore_said:
    .balign 8
joey_restore_table:
    .quad 0
joey_restore_end:
