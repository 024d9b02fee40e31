-- Moves cursors, in order and passing over locked rows, where owner, epoch and reset_epoch are what
-- the acknowledgements were made under, and the server is the one that the messages were last seen
-- on. Answers for each: moved, lease_lost, reset, locked or other_server. A cursor never goes back
-- here, and what a user's transaction has acknowledged stays.
-- $1 group  $2 partitions  $3 owners  $4 epochs  $5 reset epochs  $6 acked ids  $7 acked ahead
-- $8 incarnations
with asked as (
    select a.*, a.incarnation = pg_postmaster_start_time() as same_server
      from unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[],
                  $8::timestamptz[])
           as a (partition, owner, epoch, reset_epoch, acked_id, acked_ahead, incarnation)),
locked as (
    select c.partition, c.owner, c.epoch, c.reset_epoch
      from shardmq.cursor c
     where c.group_name = $1 and c.partition = any ($2)
     order by c.partition
       for no key update skip locked),
moved as (
    update shardmq.cursor c
       set acked_id = greatest(c.acked_id, a.acked_id),
           acked_ahead = c.acked_ahead + a.acked_ahead::int8multirange
                         - int8multirange(int8range(null, greatest(c.acked_id, a.acked_id), '[]'))
      from asked a join locked l using (partition, owner, epoch, reset_epoch)
     where c.group_name = $1 and c.partition = a.partition and a.same_server
    returning c.partition)
select a.partition,
       case when m.partition is not null then 'moved'
            when l.partition is null and exists (select from shardmq.cursor c
                 where c.group_name = $1 and c.partition = a.partition) then 'locked'
            when not a.same_server then 'other_server'
            when l.partition is null or (l.owner, l.epoch) is distinct from (a.owner, a.epoch)
                 then 'lease_lost'
            else 'reset' end
  from asked a
  left join moved m using (partition)
  left join locked l using (partition)
