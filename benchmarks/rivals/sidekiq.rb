# See sidekiq.py. Loaded by the sidekiq command as the application, or run with the name of a task as a producer.
# frozen_string_literal: true

require 'sidekiq'

URL = ENV.fetch('BENCH_REDIS_URL')
Sidekiq.configure_server { |config| config.redis = { url: URL } }
Sidekiq.configure_client { |config| config.redis = { url: URL } }
Sidekiq.logger.level = Logger::ERROR
STEP = 100
LOCK = Mutex.new

def clock
  Process.clock_gettime(Process::CLOCK_MONOTONIC, :nanosecond)
end

def mark(line)
  LOCK.synchronize do
    @file ||= File.open(File.join(ENV.fetch('BENCH_MARKS'), Process.pid.to_s), 'a').tap { |file| file.sync = true }
    @file.write(line)
  end
end

# Counts.
class Noop
  include Sidekiq::Worker
  sidekiq_options retry: true
  @count = 0
  class << self
    attr_accessor :count
  end

  def perform(_number)
    count = LOCK.synchronize { Noop.count += 1 }
    mark("#{clock} #{count}\n") if (count % STEP).zero?
  end
end

# How long ago was it enqueued?
class Lap
  include Sidekiq::Worker
  def perform(sent)
    now = clock
    mark("#{now} #{now - (sent * 1e9).to_i}\n")
  end
end

if __FILE__ == $PROGRAM_NAME
  job = ARGV[0] == 'lap' ? Lap : Noop
  $stdout.sync = true
  $stdin.each_line do |line|
    numbers = line.split.map(&:to_f)
    numbers.size == 1 ? job.perform_async(numbers[0]) : Sidekiq::Client.push_bulk('class' => job, 'args' => numbers.zip)
    puts
  end
end
