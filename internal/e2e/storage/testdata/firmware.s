# A PVH kernel that starts SeaBIOS as a reset would. Behind this code, at
# 0x110000, lies the image of the BIOS.
#
#	as --32 firmware.s -o firmware.o
#	objcopy -O binary -j .text firmware.o firmware.bin
.code32
.org 0
start:
  cld
  cli
  movl $0x110000, %esi
  movl $0xc0000, %edi
  movl $0x10000, %ecx
  rep movsl
  # CMOS: memory above 16 MiB in 64 KiB units, boot from the disk first
  movl $cmos - start + 0x100000, %esi
  movl $3, %ecx
1: lodsb
  outb %al, $0x70
  lodsb
  outb %al, $0x71
  loop 1b
  # 16-bit segments below 1 MiB, then real mode. Copy the last steps there.
  movl $low - start + 0x100000, %esi
  movl $0x8000, %edi
  movl $lowend - low, %ecx
  rep movsb
  lgdt gdtr - start + 0x100000
  lidt idtr - start + 0x100000
  ljmp $8, $0x8000
.code16
low:
  movw $16, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %fs
  movw %ax, %gs
  movw %ax, %ss
  movl %cr0, %eax
  andb $0xfe, %al
  movl %eax, %cr0
  ljmp $0, $0x8000 + (real - low)
real:
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %fs
  movw %ax, %gs
  movw %ax, %ss
  ljmp $0xf000, $0xfff0
lowend:
cmos: .byte 0x34, 0x00, 0x35, 0x0f, 0x3d, 0x02
.balign 8
gdt: .quad 0
  .quad 0x00009b000000ffff
  .quad 0x000093000000ffff
gdtr: .word 23
  .long gdt - start + 0x100000
idtr: .word 0x3ff
  .long 0
