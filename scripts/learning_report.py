def draw(*a): pass
def publish(*a): pass
def tables(*a): return ""
