from leanrec.cli import main

main()
