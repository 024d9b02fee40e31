-- Puts copies of messages aside that a group failed at, to be tried again or as dead letters, and
-- acknowledges them with that; where owner, epoch and reset_epoch are what they were handed out under and
-- the server is the one that they were last seen on. Rows locked by others are passed over. What is
-- acknowledged already is left as it is, so that the statement may be repeated. Answers for each place:
-- moved, already, lease_lost, reset, locked or other_server.
-- $1 group  $2 topic  $3 partitions  $4 owners  $5 epochs  $6 reset epochs  $7 incarnations
-- $8 message ids  $9 producers  $10 sequences  $11 indexes  $12 appended at  $13 first seen
-- $14 attempts  $15 failures  $16 seconds until they are due, or null: dead  $17 keys  $18 headers
-- $19 payloads
with asked as (
    select a.*, a.incarnation = pg_postmaster_start_time() as same_server
      from unnest($3::int[], $4::uuid[], $5::bigint[], $6::bigint[], $7::timestamptz[], $8::bigint[],
                  $9::uuid[], $10::bigint[], $11::int[], $12::timestamptz[], $13::timestamptz[],
                  $14::int[], $15::text[], $16::float8[], $17::text[], $18::text[], $19::bytea[])
           with ordinality
           as a (partition, owner, epoch, reset_epoch, incarnation, message_id, producer, sequence,
                 message_index, appended_at, first_seen, attempts, failures, due_secs, key, headers,
                 payload, place)),
locked as (
    select c.partition, c.owner, c.epoch, c.reset_epoch, c.acked_id, c.acked_ahead
      from shardmq.cursor c
     where c.group_name = $1 and c.partition = any ($3)
     order by c.partition
       for no key update skip locked),
due as (
    select a.*, a.message_id <= l.acked_id or l.acked_ahead @> a.message_id as done
      from asked a join locked l using (partition, owner, epoch, reset_epoch)
     where a.same_server),
parked as (
    insert into shardmq.retry (group_name, topic, partition, message_id, producer, sequence, message_index,
                               key, headers, payload, appended_at, first_seen, attempts, failures, due_at)
    select $1, $2, partition, message_id, producer, sequence, message_index, key, headers::jsonb, payload,
           appended_at, first_seen, attempts, failures::jsonb,
           shardmq.clock() + make_interval(secs => due_secs)
      from due where not done and due_secs is not null),
buried as (
    insert into shardmq.dead_letter (group_name, topic, partition, message_id, producer, sequence,
                                     message_index, key, headers, payload, appended_at, first_seen,
                                     attempts, failures, died_at)
    select $1, $2, partition, message_id, producer, sequence, message_index, key, headers::jsonb, payload,
           appended_at, first_seen, attempts, failures::jsonb, shardmq.clock()
      from due where not done and due_secs is null),
moved as (
    update shardmq.cursor c set acked_ahead = c.acked_ahead + d.ids
      from (select partition, range_agg(int8range(message_id, message_id, '[]')) as ids
              from due where not done group by partition) d
     where c.group_name = $1 and c.partition = d.partition)
select a.place::int,
       case when d.done then 'already' when d.place is not null then 'moved'
            when l.partition is null and exists (select from shardmq.cursor c
                 where c.group_name = $1 and c.partition = a.partition) then 'locked'
            when not a.same_server then 'other_server'
            when l.partition is null or (l.owner, l.epoch) is distinct from (a.owner, a.epoch)
                 then 'lease_lost'
            else 'reset' end
  from asked a
  left join due d using (place)
  left join locked l on l.partition = a.partition
