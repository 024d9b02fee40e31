-- Moves the node's clock: it shows so many seconds more than the true time, or less.
-- Filled in: {seconds}. For private servers that are broken on purpose.
create or replace function shardmq.clock() returns timestamptz
    language sql volatile
    as 'select clock_timestamp() + interval ''{seconds} seconds'''
