say_alive(ARGV[2])
