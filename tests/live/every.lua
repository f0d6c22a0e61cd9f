-- What a tracer must get through: coroutines, errors that leave many frames at once, strings, sorting, the collector,
-- closures, metatables, goto, varargs. Prints the same wherever and whenever it runs.
local out = {}
local function say(...) out[#out + 1] = table.concat({ ... }, " ") end

local function walk(n) if n > 0 then coroutine.yield(n) walk(n - 1) end return "end" end
for round = 1, 5 do
  local co, sum = coroutine.create(walk), 0
  while true do
    local ok, value = coroutine.resume(co, 12)
    if value == "end" then break end
    sum = sum + value
    assert(ok)
  end
  say("coroutine", round, sum, coroutine.status(co))
end

local function fail(depth) if depth == 0 then error({ code = 7 }) end return 1 + fail(depth - 1) end
for depth = 0, 30, 10 do
  local ok, why = pcall(fail, depth)
  say("pcall", tostring(ok), why.code)
end
say("nested", select(2, pcall(function() local _, e = pcall(error, "in", 0) error(e .. " out", 0) end)))
say("xpcall", select(2, xpcall(function() return nil + 1 end, function(m) return (m:gsub("^.*: ", "")) end)))
local co = coroutine.wrap(function() local ok = pcall(function() coroutine.yield(1) error("x") end) return tostring(ok) end)
say("yield across pcall", co(), co())

local words = {}
for word in ("the quick brown fox jumps over the lazy dog"):gmatch("%a+") do words[#words + 1] = word end
table.sort(words, function(a, b) return a > b end)
say(table.concat(words, ","), ("x"):rep(5, "-"), ("%5.2f|%q|%x"):format(3.14159, "a\nb", 255))
say(("hello world"):upper():reverse():sub(2, 5), ("a,b,,c"):gsub(",", ";"))
say(string.pack(">I4", 258):byte(1, -1))

local Point = {}
Point.__index = Point
Point.__add = function(a, b) return setmetatable({ x = a.x + b.x }, Point) end
local p = setmetatable({ x = 1 }, Point)
for i = 1, 40 do p = p + setmetatable({ x = i }, Point) end
say("sum", p.x)

local made = 0
for i = 1, 300 do
  local t = { i, tostring(i), function() return i end }
  made = made + #t + t[3]()
end
collectgarbage()
collectgarbage("step", 10)
say("made", made, math.maxinteger // 3, 7 // 2, 2 ^ 10, 1e15 % 7, "10" + 5)
local env = load("local a, b = ... return (a or 0) * 2, b", "chunk", "t", {})
say("load", env(21, "two"))
print(table.concat(out, "\n"))
os.exit(3, true)
