-- Ends what was parked of a group: done, again (due later) or dead; where owner, epoch and reset_epoch are
-- what it was handed out under and the server is the one of that. Rows locked by others are passed over. Answers
-- for each place: moved, already (it is not there any more), locked, lease_lost, reset or other_server.
-- Primary keys.
-- $1 group  $2 partitions  $3 owners  $4 epochs  $5 reset epochs  $6 incarnations  $7 ids
-- $8 done, again or dead  $9 attempts  $10 failures  $11 seconds until it is due
with asked as (
    select a.*, a.incarnation = pg_postmaster_start_time() as same_server
      from unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[], $6::timestamptz[], $7::uuid[],
                  $8::text[], $9::int[], $10::text[], $11::float8[])
           with ordinality
           as a (partition, owner, epoch, reset_epoch, incarnation, id, action, attempts, failures,
                 due_secs, place)),
-- What is done is done, whoever has the partition by now. All else is for its owner, which nobody becomes
-- meanwhile.
owned as (
    select c.partition, c.owner, c.epoch, c.reset_epoch
      from shardmq.cursor c
     where c.group_name = $1 and c.partition = any (array(select a.partition from asked a where a.action <> 'done'))
     order by c.partition
       for no key update skip locked),
fenced as (
    select a.*
      from asked a join shardmq.cursor c using (partition, owner, epoch, reset_epoch)
     where c.group_name = $1 and a.same_server and a.action = 'done'
    union all
    select a.*
      from asked a join owned o using (partition, owner, epoch, reset_epoch)
     where a.same_server),
locked as (
    select r.id from shardmq.retry r
     where r.id in (select f.id from fenced f)
       for update skip locked),
again as (
    update shardmq.retry r
       set attempts = f.attempts, failures = f.failures::jsonb,
           due_at = shardmq.clock() + make_interval(secs => f.due_secs)
      from fenced f join locked l on l.id = f.id
     where r.id = f.id and f.action = 'again'),
gone as (
    delete from shardmq.retry r using fenced f join locked l on l.id = f.id
     where r.id = f.id and f.action <> 'again'
    returning r.*, f.action, f.attempts as attempts_now, f.failures as failures_now),
buried as (
    insert into shardmq.dead_letter (group_name, topic, partition, message_id, producer, sequence,
                                     message_index, key, headers, payload, appended_at, first_seen,
                                     attempts, failures, died_at)
    select group_name, topic, partition, message_id, producer, sequence, message_index, key, headers,
           payload, appended_at, first_seen, attempts_now, failures_now::jsonb, shardmq.clock()
      from gone where action = 'dead')
select a.place::int,
       case when f.place is not null and l.id is not null then 'moved'
            when f.place is not null and exists (select from shardmq.retry r where r.id = a.id) then 'locked'
            when f.place is not null then 'already'
            when a.action <> 'done' and o.partition is null and c.partition is not null then 'locked'
            when not a.same_server then 'other_server'
            when o.partition is not null and (o.owner, o.epoch) is distinct from (a.owner, a.epoch)
                 then 'lease_lost'
            when c.partition is null or (c.owner, c.epoch) is distinct from (a.owner, a.epoch)
                 then 'lease_lost'
            else 'reset' end
  from asked a
  left join fenced f using (place)
  left join locked l on l.id = a.id
  left join owned o on o.partition = a.partition
  left join shardmq.cursor c on c.group_name = $1 and c.partition = a.partition
