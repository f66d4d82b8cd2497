# A boot sector that prints the last sector of its disk on COM1, writes it,
# changed, to the one before, says so and resets the machine.
#
#	as --32 bootsector.s -o bootsector.o
#	objcopy -O binary -j .text bootsector.o bootsector.bin
.code16
start:
  ljmp $0, $0x7c00 + (go - start)
go:
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movw $0x7c00, %sp
  # int 13h, AH=42h: read sector 2047 to 0:8000
  movb $0x42, %ah
  movw $0x7c00 + (packet - start), %si
  int $0x13
  jc fail
  movw $0x8000, %si
  call print
  # change it and write it back to sector 2046
  movl $0x4b4f2121, 0x8000
  movb $0xfe, (0x7c00 + (packet - start) + 8)
  movw $0x4300, %ax
  movw $0x7c00 + (packet - start), %si
  int $0x13
  jc fail
  movw $0x7c00 + (okay - start), %si
  call print
halt:
  movb $0xfe, %al
  outb %al, $0x64
  hlt
  jmp halt
fail:
  movw $0x7c00 + (bad - start), %si
  call print
  jmp halt
print:
  pushw %dx
3: lodsb
  testb %al, %al
  jz 2f
  movb %al, %bl
  movw $0x3fd, %dx
1: inb %dx, %al
  testb $0x20, %al
  jz 1b
  movb %bl, %al
  movw $0x3f8, %dx
  outb %al, %dx
  jmp 3b
2: popw %dx
  ret
packet: .byte 16, 0
  .word 1
  .word 0x8000, 0
  .quad 2047
okay: .asciz "written\r\n"
bad: .asciz "failed\r\n"
.org 510
.byte 0x55, 0xaa
