-- Records dead letters without key, headers and payload for messages of one row that can't be read, and
-- acknowledges them with that; where owner, epoch and reset_epoch are what the row was read under and the
-- server is the one that it was last seen on. What is acknowledged already is left as it is, so that the
-- statement may be repeated. Answers moved, already, locked, lease_lost, reset or other_server.
-- $1 group  $2 topic  $3 partition  $4 owner  $5 epoch  $6 reset epoch  $7 incarnation
-- $8 first message id  $9 last message id  $10 base id of the row  $11 producer  $12 sequence
-- $13 appended at  $14 failures
with locked as (
    select c.partition, c.owner, c.epoch, c.reset_epoch, c.acked_id, c.acked_ahead
      from shardmq.cursor c
     where c.group_name = $1 and c.partition = $3
       for no key update skip locked),
fenced as (
    select l.* from locked l
     where (l.owner, l.epoch, l.reset_epoch) = ($4::uuid, $5::bigint, $6::bigint)
       and $7::timestamptz = pg_postmaster_start_time()),
due as (
    select m.id
      from fenced f, generate_series($8::bigint, $9::bigint) as m (id)
     where m.id > f.acked_id and not f.acked_ahead @> m.id),
buried as (
    insert into shardmq.dead_letter (group_name, topic, partition, message_id, producer, sequence,
                                     message_index, appended_at, first_seen, attempts, failures, died_at)
    select $1, $2, $3, d.id, $11::uuid, $12::bigint, (d.id - $10::bigint)::int, $13::timestamptz,
           shardmq.clock(), 0, $14::text::jsonb, shardmq.clock()
      from due d),
moved as (
    update shardmq.cursor c
       set acked_ahead = c.acked_ahead + int8multirange(int8range($8, $9, '[]'))
                         - int8multirange(int8range(null, c.acked_id, '[]'))
     where c.group_name = $1 and c.partition = $3 and exists (select from due)
    returning 1)
select case when exists (select from moved) then 'moved'
            when exists (select from fenced) then 'already'
            when not exists (select from locked) and exists (select from shardmq.cursor c
                 where c.group_name = $1 and c.partition = $3) then 'locked'
            when $7 <> pg_postmaster_start_time() then 'other_server'
            when not exists (select from locked l where (l.owner, l.epoch) = ($4, $5)) then 'lease_lost'
            else 'reset' end
